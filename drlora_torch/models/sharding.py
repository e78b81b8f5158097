"""Models that are spread over processes before ``attach``: by ``fully_shard`` or Transformers.

What is read here is where the weights of a layer's experts are; the LoRA then goes by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

from torch import Tensor, distributed, nn

from drlora_torch.errors import AttachError
from drlora_torch.lora import parts
from drlora_torch.lora.spread import Spread, find_features
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertParameter

INSTEAD = (
    "drlora trains models in DistributedDataParallel, fully_shard, or Transformers' "
    "DistributedConfig(fsdp_size=, ep_size=, tp_size=)"
)
SIZES = ("tp_size", "ep_size", "fsdp_size", "dp_replicate_size")
OLDEST = (5, 23)


def check_sharding(model: nn.Module) -> None:
    """Refuse a model that is spread in a way that cannot be followed.

    Raises:
        AttachError: it is cut into the stages of a pipeline, or was spread by a Transformers that
            is older than what was tested.
    """
    sizes = {name: _size(model, name) for name in SIZES}
    spread = ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
    installed = version("transformers")
    if spread and tuple(map(int, installed.split(".")[:2])) < OLDEST:
        raise AttachError(
            f"the model was loaded with DistributedConfig({spread}) of Transformers {installed}, "
            "which spreads experts in another way than drlora knows; use Transformers "
            f"{'.'.join(map(str, OLDEST))} or newer, or fully_shard(model) on a model that was "
            "loaded whole"
        )
    if _size(model, "pp_size") > 1:
        raise AttachError(
            f"the model is cut into stages of a pipeline (pp_size={_size(model, 'pp_size')}), so "
            f"no process sees all layers and no budget spans them; {INSTEAD}"
        )


def is_sharded(model: nn.Module) -> bool:
    """True if processes hold some parameter of a model together."""
    return any(parts.is_sharded(parameter) for parameter in model.parameters())


def is_spread(model: nn.Module) -> bool:
    """True if several processes hold a model together, or Transformers has spread its work."""
    return is_sharded(model) or any(_size(model, name) > 1 for name in SIZES)


def count_copies(model: nn.Module, processes: int) -> int:
    """How many of the processes have the same batch, by what Transformers was told."""
    if not _is_by_transformers(model):
        return 1
    return processes // (_size(model, "dp_replicate_size") * _size(model, "fsdp_size"))


def find_spread(model: nn.Module, layer: str) -> Spread | None:
    """Where the experts of a layer are; None if every process has them whole.

    Raises:
        AttachError: they are spread in a way that their convention, or drlora, cannot follow.
    """
    experts = model.get_submodule(layer)
    convention = convention_of(experts)
    weight: Any = convention.first_weight(experts)
    split = _is_by_transformers(model) or getattr(experts, "_is_expert_parallel", False)
    if split and convention.is_packed(experts):
        raise AttachError(
            f"the experts of {layer!r} are packed ({convention.storage(experts)[0]}), and "
            "Transformers has spread them, which drlora cannot follow; load the whole model in "
            "each process, and call fully_shard"
        )
    if not parts.is_sharded(weight):
        return None
    if not _is_by_transformers(model):
        _check_data_parallel(model, layer, weight)
        return Spread(
            mesh=weight.device_mesh,
            placements=tuple(_by_rows(kind) for kind in weight.placements),
            batches=weight.device_mesh.size(),
            divisor=partial(_divisor, around(model, [layer]), weight.device_mesh.size()),
        )
    return _spread_by_transformers(model, layer, experts)


def reshard(modules: Iterable[Any]) -> None:
    """Free what ``fully_shard`` has gathered of some modules."""
    for module in modules:
        if hasattr(module, "reshard") and hasattr(module, "set_reshard_after_forward"):
            module.reshard()


def around(model: nn.Module, layers: Iterable[str]) -> list[Any]:
    """The modules that hold some layers, the layers, and the model, each once; outer ones first."""
    found: dict[int, nn.Module] = {id(model): model}
    for layer in layers:
        module = model
        for name in layer.split("."):
            module = module.get_submodule(name)
            found[id(module)] = module
    return list(found.values())


def _check_data_parallel(model: nn.Module, layer: str, weight: Any) -> None:
    """Refuse DTensors that something else than ``fully_shard`` has made, or not it alone.

    A process would not know which others train on the same batch.
    """
    by_fully_shard = any(hasattr(m, "set_reshard_after_forward") for m in around(model, [layer]))
    *replicas, last = weight.placements
    plain = last.is_shard() and len(replicas) < 2 and all(p.is_replicate() for p in replicas)
    if not (by_fully_shard and plain):
        raise AttachError(
            f"the experts of {layer!r} are DTensors with the placements {weight.placements} of a "
            f"{weight.device_mesh}, of which drlora cannot tell who trains on which batch; wrong:\n"
            "    distribute_tensor, parallelize_module or another library, then attach\nright:\n"
            "    attach, then fully_shard(model); or fully_shard(model) alone, then attach; or "
            "Transformers' DistributedConfig(fsdp_size=, ep_size=, tp_size=), then attach"
        )


def _divisor(modules: list[Any], batches: int) -> float:
    """What ``fully_shard`` divides the gradients of a layer by: the mean, or what a user has set.

    Args:
        modules: those that hold the layer; the innermost that is sharded decides.
        batches: of the processes.
    """
    for module in reversed(modules):
        if hasattr(module, "set_gradient_divide_factor"):
            groups = getattr(module._get_fsdp_state(), "_fsdp_param_groups", None) or ()
            factors = [getattr(group, "gradient_divide_factor", None) for group in groups]
            return next((float(each) for each in factors if each is not None), float(batches))
    return float(batches)


def _by_rows(placement: Any) -> Any:
    from torch.distributed.tensor import Shard

    return placement if placement.is_replicate() else Shard(0)


def _is_by_transformers(model: nn.Module) -> bool:
    return _size(model, "tp_size") > 1 or _size(model, "ep_size") > 1


def _size(model: nn.Module, name: str) -> int:
    config: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    return int(getattr(config, name, None) or 1)


def _spread_by_transformers(model: nn.Module, layer: str, experts: Any) -> Spread:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

    convention = convention_of(experts)
    if convention.name != "interface":
        raise AttachError(
            f"the experts of {layer!r} ({type(experts).__name__}) run in a way that cannot be "
            "followed under tensor or expert parallelism; use DistributedConfig(fsdp_size=) alone"
        )
    weight: Any = convention.first_weight(experts)
    world = distributed.group.WORLD
    assert world is not None
    mesh = DeviceMesh.from_group(world, weight.device_mesh.device_type)
    batches = _size(model, "dp_replicate_size") * _size(model, "fsdp_size")
    by_expert = getattr(experts, "_is_expert_parallel", False)
    chosen = _experts_here(weight, experts.num_experts) if by_expert else slice(None)
    features = {} if by_expert else dict(_features_here(experts))
    # Processes that share a batch each have a part of its gradient; where the experts are not
    # split, each has all of it.
    divisor = float(batches if by_expert or features else mesh.size())
    return Spread(
        mesh=mesh,
        placements=(Shard(0),),
        batches=batches,
        divisor=lambda: divisor,
        experts=chosen,
        features=features,
    )


def _experts_here(weight: Any, count: int) -> slice:
    """The experts that a process computes under expert parallelism, ``count`` of them."""
    first = weight.device_mesh.get_local_rank("ep") * count
    return slice(first, first + count)


def _features_here(experts: Any) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Input and output features of each projection that a process computes with."""
    convention = convention_of(experts)
    for projection in convention.projection_shapes(experts):
        where = convention.location(experts, projection)
        assert isinstance(where, ExpertParameter)
        weight: Any = getattr(experts.get_submodule(where.module), where.name)
        for name, dimension in (("lora_A", 2), ("lora_B", 1)):
            at = 3 - dimension if where.transposed else dimension
            if (chosen := find_features(weight, at)) is not None:
                yield (projection, name), chosen
