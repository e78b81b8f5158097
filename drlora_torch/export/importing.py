"""Start from a PEFT adapter of the experts: its B A becomes the adapter's, at the starting ranks.

Read are both namings that :mod:`drlora_torch.export` writes, of whatever PEFT version or trainer
they come from: stacked ``target_parameters``, and one LoRA per expert and projection.

Shape letters: N experts, R rank of the PEFT adapter, I and O input and output features.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drlora_torch.errors import AttachError, CheckpointError
from drlora_torch.export import peft_directory, per_expert, scaling, writing
from drlora_torch.export.factors import Factors, of_rank

if TYPE_CHECKING:
    from drlora_torch.adapter import AdaptedLayer, Adapter

Errors = dict[str, dict[str, NDArray[np.float64]]]


def start_from(adapter: Adapter, path: str | os.PathLike[str]) -> Errors:
    """See :meth:`drlora_torch.Adapter.import_peft`."""
    if adapter.engine.step_count:
        raise AttachError(
            f"import_peft is a starting point, but the adapter has made "
            f"{adapter.engine.step_count} steps; attach a new one"
        )
    peft_directory.check_conventions(adapter)
    held, config = writing.read(Path(path))
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise CheckpointError(f"{path} is not plain LoRA, which is all that can be imported")
    found: dict[tuple[str, str], Factors] = {}
    for name, layer in adapter.layers.items():
        for projection, factors in _of_layer(layer, name, config, held).items():
            found[name, projection] = factors
    routers = _routers(adapter, held)
    if held:
        raise CheckpointError(
            f"{path} also adapts {sorted(held)[0]!r}, which this adapter does not; attach with "
            "the matching targets, layers and router, or load other modules with PEFT"
        )
    if not found:
        raise CheckpointError(f"{path} holds no LoRA of the adapted experts")
    return _fill(adapter, found, routers)


def _of_layer(
    layer: AdaptedLayer, name: str, config: Mapping[str, Any], held: dict[str, Tensor]
) -> dict[str, Factors]:
    """Take the factors of one layer out of ``held``, scaled for a scaling of 1."""
    prefix = peft_directory.PREFIX + peft_directory.own_name(name)
    targets = config.get("target_parameters") or ()
    chosen = [p for p in layer.record.projections if _matches(f"{prefix}.{p}", targets)]
    order = peft_directory.parameter_order(layer.experts, dict.fromkeys(chosen))
    found = {}
    for projection, shape in layer.record.projections.items():
        if projection not in dict(layer.lora.items()):
            continue
        if projection in order:
            key = peft_directory.stacked_key(prefix, len(order) - 1 - order.index(projection))
            factors = _stacked(held, key, layer.record.num_experts)
            target = f"{prefix}.{projection}".removeprefix(peft_directory.PREFIX)
            factor = scaling.of(config, target)
        else:
            separate = _separate(layer, prefix, projection, config, held)
            if separate is None:
                continue
            factors, factor = separate, 1.0
        _check(factors, f"{name}.{projection}", (shape.in_features, shape.out_features))
        found[projection] = Factors(factors.lora_A, factor * factors.lora_B)
    return found


def _matches(key: str, targets: Any) -> bool:
    return any(key.endswith(f".{target}") for target in targets)


def _stacked(held: dict[str, Tensor], key: str, experts: int) -> Factors:
    """Undo PEFT's flat layout: A has the expert slowest, B has it fastest."""
    try:
        flat_A, flat_B = (held.pop(f"{key}.lora_{part}.weight") for part in "AB")
        lora_A = flat_A.reshape(experts, -1, flat_A.shape[-1])
        lora_B = flat_B.reshape(flat_B.shape[0], -1, experts).permute(2, 0, 1)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"no LoRA of {experts} experts at {key!r}: {error}") from error
    return Factors(lora_A, lora_B)


def _separate(
    layer: AdaptedLayer,
    prefix: str,
    projection: str,
    config: Mapping[str, Any],
    held: dict[str, Tensor],
) -> Factors | None:
    """Gather one LoRA per expert; gate and up with one A share it, else their ranks add up."""
    parts = []
    for part in per_expert.part_names(projection):
        keys = [f"{prefix}.{expert}.{part}" for expert in range(layer.record.num_experts)]
        if not any(f"{key}.lora_A.weight" in held for key in keys):
            continue
        factor = scaling.of(config, keys[0].removeprefix(peft_directory.PREFIX))
        try:
            lora_A = torch.stack([held.pop(f"{key}.lora_A.weight") for key in keys])
            lora_B = torch.stack([held.pop(f"{key}.lora_B.weight") for key in keys])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"incomplete or uneven LoRA of {prefix}.*.{part}: {error}"
            ) from error
        parts.append(Factors(lora_A, factor * lora_B))
    if len(parts) < len(per_expert.part_names(projection)):
        return None
    if len(parts) == 1:
        return parts[0]
    gate, up = parts
    if torch.equal(gate.lora_A, up.lora_A):
        return Factors(gate.lora_A, per_expert.fuse(layer.experts, gate.lora_B, up.lora_B))
    lora_B = per_expert.fuse(
        layer.experts,
        torch.cat([gate.lora_B, torch.zeros_like(up.lora_B)], dim=-1),
        torch.cat([torch.zeros_like(gate.lora_B), up.lora_B], dim=-1),
    )
    return Factors(torch.cat([gate.lora_A, up.lora_A], dim=1), lora_B)


def _check(factors: Factors, where: str, features: tuple[int, int]) -> None:
    own = (factors.lora_A.shape[-1], factors.lora_B.shape[1])
    if own != features:
        raise CheckpointError(f"{where} has features {features}, the PEFT adapter has {own}")
    if factors.lora_A.shape[1] != factors.lora_B.shape[2]:
        raise CheckpointError(f"{where}: A and B of the PEFT adapter differ in rank")
    if not all(bool(torch.isfinite(each).all()) for each in factors):
        raise CheckpointError(f"{where}: the PEFT adapter holds values that are not finite")


def _routers(adapter: Adapter, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take routers that learn out of ``held``; their buffers are the base model's."""
    values = {}
    for layer in adapter.layers.values():
        if layer.router is None or not adapter.router_parameters():
            continue
        for part, own in layer.router.state_dict().items():
            name = f"{layer.record.router}.{part}"
            value = held.pop(peft_directory.PREFIX + peft_directory.own_name(name), None)
            if value is None or name not in adapter.router_parameters():
                continue
            if value.shape != own.shape:
                raise CheckpointError(f"router {name} has shape {tuple(value.shape)}")
            values[name] = value
    return values


@torch.no_grad()
def _fill(
    adapter: Adapter, found: Mapping[tuple[str, str], Factors], routers: Mapping[str, Tensor]
) -> Errors:
    """Write the factors; rank dimensions that they leave empty keep their fresh rows of A."""
    rank = adapter.engine.config.starting_rank
    ours = adapter.options.scaling(adapter.engine.config)
    errors: Errors = {}
    for (name, projection), factors in found.items():
        (lora_A, lora_B), error = of_rank(factors, rank)
        errors.setdefault(name, {})[projection] = error
        layer = adapter.layers[name].lora
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
        adapter.router_parameters()[name].copy_(value)
    return errors
