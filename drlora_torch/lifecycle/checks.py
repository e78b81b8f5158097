"""What ``attach`` refuses, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from drlora_core import AllocatorEngine
from drlora_core.errors import LayoutError, UnknownLayerError, near_misses
from drlora_torch.errors import AttachError, ModelError
from drlora_torch.lifecycle.residents import Residents, user_of
from drlora_torch.lora.kernels import Kernel, grouped
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertParameter
from drlora_torch.models.records import MoELayer
from drlora_torch.options import AdapterOptions, RouterMode


def check_context() -> None:
    """What is made now has values, and can learn."""
    if torch.is_inference_mode_enabled():
        raise AttachError(
            "attach and load make parameters, which could never be trained if they were made "
            "inside torch.inference_mode(); call them outside of it (torch.no_grad() does not "
            "matter)"
        )
    if torch.get_default_device().type == "meta":
        raise AttachError(
            "attach and load draw the rows of the LoRA, which have no values while the meta device "
            "is the default; call them outside of torch.device('meta')"
        )


def check_new(engine: AllocatorEngine) -> None:
    """A new adapter takes an engine that has made no step; others belong to their adapter."""
    if engine.step_count:
        raise AttachError(
            f"the engine has made {engine.step_count} steps already: its ranks and its growth "
            "window are those of another run; use a new AllocatorEngine(config), or "
            "drlora_torch.load(model, path) to go on with a saved adapter (to start with given "
            "ranks: engine.add_layer(name, num_experts, ranks=...))"
        )


def check_free(residents: Residents, engine: AllocatorEngine) -> None:
    """A model takes another adapter if that brings its own engine."""
    known = residents.by_name.values()
    own = {id(layer.lora) for attached in known for layer in attached.layers.values()}
    if any(isinstance(m, ExpertLoRA) and id(m) not in own for m in residents.model.modules()):
        raise AttachError(
            "the model has an adapter already, attached to a part of it or to a model around it; "
            "call its detach() first, or attach both to the same model"
        )
    if (user := user_of(engine)) is not None:
        raise AttachError(
            f"this engine decides the ranks of adapter {user.name!r} of a "
            f"{type(user.model).__name__}; give each adapter an AllocatorEngine of its own"
        )
    residents.check_not_disabled()


def check_layers(model: nn.Module, records: list[MoELayer], options: AdapterOptions) -> None:
    """The chosen layers can be adapted with these options."""
    _check_beside_peft(records)
    _check_targets(records, options.targets)
    _check_routers(records, options)
    if options.kernel is Kernel.GROUPED:
        for record in records:
            _check_grouped(model.get_submodule(record.name), record)


def check_engine(engine: AllocatorEngine, records: list[MoELayer]) -> None:
    """An engine comes empty, or with exactly the model's layers."""
    if not engine.layer_names:
        return
    wanted = {record.name: record.num_experts for record in records}
    own = {name: engine.num_experts(name) for name in engine.layer_names}
    if own != wanted:
        differing = sorted(
            name for name in own.keys() | wanted if own.get(name) != wanted.get(name)
        )
        raise LayoutError(
            f"the engine's layers are not the model's: {differing[0]!r} has "
            f"{own.get(differing[0], 'no')} experts in the engine and "
            f"{wanted.get(differing[0], 'none')} in the model; use a new AllocatorEngine"
        )


def _check_beside_peft(records: list[MoELayer]) -> None:
    for record in records:
        if record.name.endswith(".base_layer"):
            raise AttachError(
                f"PEFT adapts the experts of {record.name.replace('.base_layer', '')!r} itself; "
                "leave them out of its target_parameters, or merge its adapter first"
            )


def _check_targets(records: list[MoELayer], targets: Sequence[str] | None) -> None:
    known = sorted({name for record in records for name in record.projections})
    for target in targets or ():
        if target not in known:
            raise UnknownLayerError(f"no projection {target!r}; {near_misses(target, known)}")
    for record in records:
        if targets is not None and not set(targets) & set(record.projections):
            raise UnknownLayerError(f"layer {record.name!r} has none of the targets {targets}")


def _check_routers(records: list[MoELayer], options: AdapterOptions) -> None:
    missing = [record.name for record in records if record.router is None]
    if options.router is not RouterMode.FROZEN and missing:
        raise ModelError(
            f"router={options.router.value!r} needs the routers, but none was found for "
            f"{missing[0]!r}; use router='frozen'"
        )


def _check_grouped(experts: nn.Module, record: MoELayer) -> None:
    """``grouped_mm`` takes the weights of a layer, wherever its convention keeps them."""
    convention = convention_of(experts)
    for projection, (inner, outer) in record.projections.items():
        stacked = isinstance(convention.location(experts, projection), ExpertParameter)
        weight = convention.expert_weight(experts, projection, 0)
        if not stacked or not grouped.supports((record.num_experts, inner, outer), weight.dtype):
            found = f"{record.dtype}{[outer, inner]}" if stacked else "one Linear per expert"
            raise AttachError(
                f"kernel='grouped' cannot multiply {record.name}.{projection}, {found}: it takes "
                "float32, bfloat16 and float16 weights of all experts in one parameter, with rows "
                "of a multiple of 16 bytes; use kernel='ragged'"
            )
