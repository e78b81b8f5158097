"""Start from a PEFT adapter of the experts: its B A becomes the adapter's, at the starting ranks.

It reads every layout that :mod:`drlora_torch.storage.peft` writes, from any trainer: stacked
``target_parameters``, Linears, and one LoRA per expert and projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.errors import AttachError, CheckpointError
from drlora_torch.lifecycle.routers import trained_routers
from drlora_torch.lora.layers import ProjectionShape
from drlora_torch.storage.peft import files, per_expert, stacked
from drlora_torch.storage.peft.factors import Expert, Factors, FloatArray, resize, write_slots
from drlora_torch.storage.peft.files import PREFIX, own_name

Errors = dict[str, dict[str, FloatArray]]


def start_from(attached: Attached, path: Path) -> Errors:
    """Carry out :meth:`drlora_torch.Adapter.import_peft`."""
    if attached.engine.step_count:
        raise AttachError(
            f"import_peft is a starting point, but the adapter has made "
            f"{attached.engine.step_count} steps; attach a new one"
        )
    held, config = files.read(path)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise CheckpointError(f"{path} is not plain LoRA, which is all that can be imported")
    found: dict[tuple[str, str], list[Expert]] = {}
    for name, layer in attached.layers.items():
        for projection, experts in _take_stacked(layer, config, held).items():
            found[name, projection] = experts
    for (name, projection), namings in per_expert.namings(attached).items():
        shape = attached.layers[name].record.projections[projection]
        for naming in namings:
            separate = per_expert.take(held, config, naming, shape)
            if separate is not None:
                found[name, projection] = separate
    for (name, projection), experts in found.items():
        shape = attached.layers[name].record.projections[projection]
        _check(experts, f"{name}.{projection}", shape)
    routers = _take_routers(attached, held)
    if held:
        raise CheckpointError(
            f"{path} also adapts {min(held)!r}, which this adapter does not; attach with the "
            "matching targets, layers and router, or load other modules with PEFT"
        )
    if not found:
        raise CheckpointError(f"{path} holds no LoRA of the adapted experts")
    return _fill(attached, found, routers)


def _take_stacked(
    layer: AdaptedLayer, config: Mapping[str, Any], held: dict[str, Tensor]
) -> dict[str, list[Expert]]:
    """Take what PEFT adapts as parameters of all experts, scaled for a scaling of 1."""
    suffixes = tuple(f".{target}" for target in config.get("target_parameters") or ())
    chosen = {
        projection: where
        for projection, where in stacked.parameters_of(layer).items()
        if f".{stacked.qualified(layer, where)}".endswith(suffixes)  # as PEFT matches them
    }
    found = {}
    for projection, target in stacked.targets(layer, chosen).items():
        experts = stacked.take(held, target, layer.record.num_experts)
        scaling = files.scaling_of(config, target.parameter)
        found[projection] = [(lora_A, scaling * lora_B) for lora_A, lora_B in experts]
    return found


def _check(experts: Sequence[Expert], where: str, shape: ProjectionShape) -> None:
    for lora_A, lora_B in experts:
        features = (lora_A.shape[1], lora_B.shape[0])
        if features != shape:
            raise CheckpointError(
                f"{where} has features {tuple(shape)}, the PEFT adapter has {features}"
            )
        if lora_A.shape[0] != lora_B.shape[1]:
            raise CheckpointError(f"{where}: A and B of the PEFT adapter differ in rank")
        if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
            raise CheckpointError(f"{where}: the PEFT adapter holds values that are not finite")


def _take_routers(attached: Attached, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take routers that learn out of ``held``; their buffers are the base model's."""
    learning = trained_routers(attached)
    values = {}
    for layer in attached.layers.values() if learning else ():
        for part in layer.router.state_dict() if layer.router is not None else ():
            name = f"{layer.record.router}.{part}"
            value = held.pop(PREFIX + own_name(name), None)
            if value is None or name not in learning:
                continue
            if value.shape != learning[name].shape:
                raise CheckpointError(f"router {name} has shape {tuple(value.shape)}")
            values[name] = value
    return values


@torch.no_grad()
def _fill(
    attached: Attached,
    found: Mapping[tuple[str, str], Sequence[Expert]],
    routers: Mapping[str, Tensor],
) -> Errors:
    rank = attached.engine.config.starting_rank
    scaling = attached.options.scaling(attached.engine.config)
    errors: Errors = {}
    for (name, projection), experts in found.items():
        (lora_A, lora_B), error = resize(experts, rank)
        errors.setdefault(name, {})[projection] = error
        lora = attached.layers[name].lora
        write_slots(lora, dict(lora.items())[projection], Factors(lora_A, lora_B / scaling))
    trained = trained_routers(attached)
    for name, value in routers.items():
        trained[name].copy_(value)
    return errors
