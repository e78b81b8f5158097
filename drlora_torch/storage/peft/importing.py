"""Start from a PEFT adapter of the experts: its B A becomes the adapter's, at the starting ranks.

It reads every layout that :mod:`drlora_torch.storage.peft` writes, from any trainer: stacked
``target_parameters``, Linears, and one LoRA per expert and projection.

Shape letters: N experts, R rank of the PEFT adapter, I and O input and output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.errors import AttachError, CheckpointError
from drlora_torch.lifecycle.routers import trained_routers
from drlora_torch.lora.layers import ProjectionShape
from drlora_torch.step.parameters import router_parameters
from drlora_torch.storage.peft import files, per_expert, scaling, stacked
from drlora_torch.storage.peft.factors import Factors, of_rank
from drlora_torch.storage.peft.names import PREFIX, joined, own_name
from drlora_torch.storage.peft.places import Places, parameters_of

Errors = dict[str, dict[str, NDArray[np.float64]]]


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
    found: dict[tuple[str, str], Factors] = {}
    places = Places(attached)
    for name, layer in attached.layers.items():
        for projection, factors in _of_layer(layer, name, places, config, held).items():
            found[name, projection] = factors
    routers = _routers(attached, held)
    if held:
        raise CheckpointError(
            f"{path} also adapts {sorted(held)[0]!r}, which this adapter does not; attach with "
            "the matching targets, layers and router, or load other modules with PEFT"
        )
    if not found:
        raise CheckpointError(f"{path} holds no LoRA of the adapted experts")
    return _fill(attached, found, routers)


def _of_layer(
    layer: AdaptedLayer,
    name: str,
    places: Places,
    config: Mapping[str, Any],
    held: dict[str, Tensor],
) -> dict[str, Factors]:
    """Take the factors of one layer out of ``held``, scaled for a scaling of 1."""
    found = _stacked(layer, name, config, held)
    for projection, _ in layer.lora.items():
        shape = layer.record.projections[projection]
        for candidate in places.candidates(name, projection):
            separate = per_expert.gather(held, config, candidate, shape)
            if separate is not None:
                found[projection] = separate
    for projection, factors in found.items():
        _check(factors, f"{name}.{projection}", layer.record.projections[projection])
    return found


def _stacked(
    layer: AdaptedLayer, name: str, config: Mapping[str, Any], held: dict[str, Tensor]
) -> dict[str, Factors]:
    """What PEFT adapts as parameters of all experts."""
    wanted = config.get("target_parameters") or ()
    chosen = {
        projection: where
        for projection, where in parameters_of(layer).items()
        if _matches(joined(own_name(name), where.module, where.name), wanted)
    }
    found = {}
    for target in stacked.targets(layer.experts, own_name(name), chosen):
        try:
            flat_A, flat_B = (held.pop(f"{PREFIX}{target.key}.lora_{p}.weight") for p in "AB")
        except KeyError as error:
            experts = layer.record.num_experts
            raise CheckpointError(f"no LoRA of {experts} experts at {error}") from error
        lora_A, lora_B = stacked.unflat(flat_A, flat_B, target, layer.record.num_experts)
        found[target.projection] = Factors(lora_A, scaling.of(config, target.parameter) * lora_B)
    return found


def _matches(name: str, targets: Any) -> bool:
    """As PEFT matches names of parameters."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _check(factors: Factors, where: str, shape: ProjectionShape) -> None:
    features = (factors.lora_A.shape[-1], factors.lora_B.shape[1])
    if features != shape:
        raise CheckpointError(
            f"{where} has features {tuple(shape)}, the PEFT adapter has {features}"
        )
    if factors.lora_A.shape[1] != factors.lora_B.shape[2]:
        raise CheckpointError(f"{where}: A and B of the PEFT adapter differ in rank")
    if not all(bool(torch.isfinite(each).all()) for each in factors):
        raise CheckpointError(f"{where}: the PEFT adapter holds values that are not finite")


def _routers(attached: Attached, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take routers that learn out of ``held``; their buffers are the base model's."""
    values = {}
    for layer in attached.layers.values():
        if layer.router is None or not router_parameters(attached):
            continue
        for part, current in layer.router.state_dict().items():
            name = f"{layer.record.router}.{part}"
            value = held.pop(PREFIX + own_name(name), None)
            if value is None or name not in router_parameters(attached):
                continue
            if value.shape != current.shape:
                raise CheckpointError(f"router {name} has shape {tuple(value.shape)}")
            values[name] = value
    return values


@torch.no_grad()
def _fill(
    attached: Attached, found: Mapping[tuple[str, str], Factors], routers: Mapping[str, Tensor]
) -> Errors:
    """Write the factors; rank dimensions that they leave empty keep their fresh rows of A."""
    rank = attached.engine.config.starting_rank
    ours = attached.options.scaling(attached.engine.config)
    errors: Errors = {}
    for (name, projection), factors in found.items():
        (lora_A, lora_B), error = of_rank(factors, rank)
        errors.setdefault(name, {})[projection] = error
        layer = attached.layers[name].lora
        slots = dict(layer.items())[projection]
        active = layer.table.active()
        owner, position = (
            torch.from_numpy(each[active]) for each in (layer.table.owner, layer.table.position)
        )
        rows, columns = lora_A[owner, position], lora_B[owner, :, position] / ours
        filled = (columns != 0).any(dim=1)
        index = torch.from_numpy(active)[filled].to(layer.device)
        slots.lora_A[index] = rows[filled].to(slots.lora_A)
        slots.lora_B[index] = columns[filled].to(slots.lora_B)
    for name, value in routers.items():
        trained_routers(attached)[name].copy_(value)
    return errors
