"""LoRA of Linears that are no routed experts: attention, shared experts, dense layers.

The LoRA is a child of its Linear, and a forward hook adds what it gives. So no module is replaced
and no parameter renamed, a Linear may be stored in any number of bits, and of several adapters
only the active one has hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from drlora_core import AllocatorEngine
from drlora_torch.attached import AdaptedLinear, Attached
from drlora_torch.errors import AttachError
from drlora_torch.lifecycle.modules import find_modules
from drlora_torch.lora import parts
from drlora_torch.lora.dense import DenseLoRA
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertParameter
from drlora_torch.models.records import MoELayer
from drlora_torch.models.sharding import is_spread
from drlora_torch.models.wrappers import peft_layers
from drlora_torch.options import AdapterOptions

Reason = Callable[[str, nn.Module], str | None]
"""Why a module gets no LoRA, None if it does."""


def choose_linears(
    model: nn.Module,
    options: AdapterOptions,
    found: Iterable[MoELayer],
    modules_to_save: Collection[str] = (),
) -> dict[str, nn.Linear]:
    """Find the Linears that get LoRA, by qualified name; none without ``attention_rank``.

    Args:
        model: it is not changed.
        options: ``attention_rank`` and ``attention_targets``.
        found: all MoE layers of the model, adapted or not.
        modules_to_save: names of the modules that are trained whole.

    Raises:
        UnknownLayerError: there is no module of a target's name; the message lists near misses.
        AttachError: a target cannot be adapted, nothing is left to adapt, PEFT adapts a Linear
            already, or processes hold the model together.
    """
    if options.attention_rank is None:
        return {}
    if is_spread(model):
        raise AttachError(
            "attention_rank adds LoRA to Linears, and processes hold those of this model together "
            "already; wrong:\n    fully_shard(model), or DistributedConfig, then "
            "attach(..., attention_rank=...)\nright:\n    load the whole model in each process, "
            "attach, and then fully_shard(model) or DistributedDataParallel(model)"
        )
    reason = _reasons(model, options.attention_rank, list(found), modules_to_save)
    if options.attention_targets is None:
        linears = _linears(model)
        chosen = {n: linear for n, linear in linears.items() if reason(n, linear) is None}
        if not chosen:
            raise AttachError(
                f"attention_rank={options.attention_rank}, but the model has no Linear to adapt "
                "beside its routed experts, routers and heads whose smaller side is larger than "
                "that; leave it out, or choose a lower one"
            )
    else:
        chosen = {}
        for target in options.attention_targets:
            chosen |= _of_target(model, target, list(found), reason)
    for name, linear in chosen.items():
        _check(name, linear)
    return chosen


def adapt_linears(
    linears: Mapping[str, nn.Linear], engine: AllocatorEngine, options: AdapterOptions
) -> dict[str, AdaptedLinear]:
    """Make the LoRA of Linears, all at zero."""
    adapted = {}
    for name, linear in linears.items():
        assert options.attention_rank is not None
        lora = DenseLoRA(
            name,
            linear.in_features,
            linear.out_features,
            rank=options.attention_rank,
            scaling=options.attention_scaling(),
            dropout=options.dropout,
            seed=engine.config.seed,
        )
        weight = linear.weight
        lora.to(device=weight.device, dtype=options.lora_dtype(weight.dtype))
        adapted[name] = AdaptedLinear(linear, lora)
    return adapted


def install(attached: Attached) -> Callable[[], None]:
    """Let the Linears run with their LoRA; return the undo."""
    handles = []
    for linear, lora in ((each.linear, each.lora) for each in attached.dense.values()):
        if not any(map(parts.is_sharded, lora.parameters())):
            lora.to(device=linear.weight.device)
        lora.train(linear.training)
        handles.append(linear.register_forward_hook(_adding(attached, lora), with_kwargs=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _adding(attached: Attached, lora: DenseLoRA) -> Callable[..., Tensor]:
    def add_update(
        linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if not attached.enabled:
            return output
        (inputs,) = (*args, *kwargs.values())
        summed: Tensor = output + lora(inputs)
        return summed.to(output.dtype)

    return add_update


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All Linears of a model but PEFT's own; those in fewer bits are Linears too."""
    of_peft: set[int] = set()
    for layer in peft_layers(model):
        base = layer.get_base_layer().modules() if hasattr(layer, "get_base_layer") else ()
        of_peft |= {id(part) for part in layer.modules()} - {id(part) for part in base}
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, nn.Linear) and id(m) not in of_peft}


def _of_target(
    model: nn.Module, target: str, found: list[MoELayer], reason: Reason
) -> dict[str, nn.Linear]:
    """The Linears that a name stands for; routed experts, which have their own LoRA, aside."""
    named = dict(model.named_modules())
    matching = {target: named[target]} if target in named else find_modules(model, target)
    experts = _experts(model, found)
    inside = {name for name in matching if _is_inside(name, experts)}
    chosen: dict[str, nn.Linear] = {}
    for name, module in matching.items():
        if name in inside and len(inside) < len(matching):
            continue
        if (obstacle := reason(name, module)) is not None:
            raise AttachError(f"{name!r} of attention_targets cannot be adapted: {obstacle}")
        assert isinstance(module, nn.Linear)
        chosen[name] = module
    return chosen


def _reasons(
    model: nn.Module, rank: int, found: list[MoELayer], modules_to_save: Collection[str]
) -> Reason:
    """Make the function that says why a module of a model is left out."""
    places = {
        "it is in the routed experts, whose LoRA targets= and layers= choose": _experts(
            model, found
        ),
        "it is a router; router='trainable' trains it": list(_routers(model, found)),
        "modules_to_save trains it whole": modules_to_save,
    }
    heads = {id(head) for head in _heads(model)}
    shared = _sharing(model)

    def reason(name: str, module: nn.Module) -> str | None:
        for why, holders in places.items():
            if _is_inside(name, holders):
                return why
        if id(module) in heads:
            return "it is the output head; modules_to_save trains it whole"
        if id(module) in shared:
            return "another module shares its weight"
        return _unfit(module, rank)

    return reason


def _unfit(module: nn.Module, rank: int) -> str | None:
    """Why LoRA of a rank does not fit to a module, wherever it is."""
    if any(layer is module for layer in peft_layers(module)):
        return "PEFT adapts it already; leave it to one of the two"
    if not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}, no Linear; name the Linears inside of it"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "torch's MultiheadAttention reads its weight without calling it"
    if (side := min(module.in_features, module.out_features)) <= rank:
        return f"its smaller side, {side}, is not larger than attention_rank={rank}"
    return None


def _check(name: str, linear: nn.Linear) -> None:
    """Refuse what a user has to decide, also where no target names it."""
    if name.endswith(".base_layer"):
        raise AttachError(
            f"PEFT adapts {name.removesuffix('.base_layer')!r} already; leave it to one of the "
            "two: name the others with attention_targets=, or leave out attention_rank"
        )
    if linear.weight.is_meta:
        raise AttachError(
            f"the weight of {name!r} is on the meta device; load the weights first, without "
            "offloading them (to CPU or disk)"
        )


def _experts(model: nn.Module, found: list[MoELayer]) -> list[str]:
    """Modules that hold nothing but routed experts; a layer may hold shared ones beside them."""
    names = []
    for layer in found:
        module = model.get_submodule(layer.name)
        inside: set[str] = set()
        for projection in layer.projections:  # none, if it cannot be adapted
            where = convention_of(module).location(module, projection)
            inside |= {where.module} if isinstance(where, ExpertParameter) else {*where.experts}
        names += [f"{layer.name}.{each}".strip(".") for each in inside or {""}]
    return names


def _routers(model: nn.Module, found: list[MoELayer]) -> Iterator[str]:
    """The routers, and where none is known, Linears beside the experts with an output for each."""
    for layer in found:
        parent = layer.name.rpartition(".")[0]
        if layer.router is not None:
            yield layer.router
            continue
        for name, module in model.get_submodule(parent).named_children():
            if getattr(module, "out_features", None) == layer.num_experts:
                yield f"{parent}.{name}".strip(".")


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """The output heads of a model and of its parts, by what they say and by the usual name."""
    for module in model.modules():
        if isinstance(named := getattr(module, "lm_head", None), nn.Module):
            yield named
        get_head = getattr(module, "get_output_embeddings", None)
        try:
            head = None if get_head is None else get_head()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module):
            yield head


def _sharing(model: nn.Module) -> set[int]:
    """Modules that have a parameter in common with another one, by identity."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return {id(module) for several in owners.values() if len(several) > 1 for module in several}


def _is_inside(name: str, holders: Iterable[str]) -> bool:
    return any(not holder or f"{name}.".startswith(f"{holder}.") for holder in holders)
