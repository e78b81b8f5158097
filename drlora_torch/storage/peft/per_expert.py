"""One LoRA per expert and projection, two-dimensional, under the names of unfused experts.

``{expert}.gate_proj.lora_A.weight`` [R, I] and ``lora_B.weight`` [O, R], likewise for the others:
what engines read that serve models by the names of their checkpoints. Those are asked of
Transformers; experts that stay fused on disk get ``{experts}.{i}.gate_proj``, ``up_proj`` and
``down_proj``, or the projection's own name. Parts of a fused projection get the same A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drlora_torch.errors import CheckpointError
from drlora_torch.lora.layers import ProjectionShape
from drlora_torch.models.checkpoint_names import Place
from drlora_torch.models.location import ExpertLinears, ExpertParameter, Location
from drlora_torch.storage.peft import scaling
from drlora_torch.storage.peft.factors import Factors
from drlora_torch.storage.peft.names import PREFIX, joined

FUSED, PARTS = "gate_up_proj", ("gate_proj", "up_proj")


def own_places(
    layer: str, projection: str, where: Location, shape: ProjectionShape, experts: int
) -> list[Place]:
    """Places under the names that the model itself has, or would have if it were not fused."""
    outputs = shape.out_features
    if isinstance(where, ExpertLinears):
        return [
            Place(joined(layer, expert, where.projection), index, slice(0, outputs))
            for index, expert in enumerate(where.experts)
        ]
    parent = joined(layer, where.module if where.name == projection else "")
    return [
        Place(joined(parent, str(expert), part), expert, rows)
        for expert in range(experts)
        for part, rows in _parts(projection, where, outputs)
    ]


def tensors(places: list[Place], factors: Factors, ranks: list[int]) -> dict[str, Tensor]:
    """Two-dimensional tensors; ``ranks`` has that of each expert, the rest is cut off."""
    named: dict[str, Tensor] = {}
    for name, expert, rows in places:
        rank = ranks[expert]
        named[f"{PREFIX}{name}.lora_A.weight"] = factors.lora_A[expert, :rank].clone()
        named[f"{PREFIX}{name}.lora_B.weight"] = factors.lora_B[expert, rows, :rank].clone()
    return named


def gather(
    held: dict[str, Tensor],
    config: Mapping[str, Any],
    places: list[Place],
    shape: ProjectionShape,
) -> Factors | None:
    """Take the LoRA at some places out of ``held``, scaled for a scaling of 1; None if none is.

    Parts of an expert with one A share it, else their ranks add up.

    Raises:
        CheckpointError: some places have a LoRA and others do not, or none that fits.
    """
    if not any(f"{PREFIX}{place.name}.lora_A.weight" in held for place in places):
        return None
    experts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for name, expert, rows in places:
        try:
            lora_A, part = (held.pop(f"{PREFIX}{name}.lora_{each}.weight") for each in "AB")
            lora_B = part.new_zeros(shape.out_features, part.shape[1])
            lora_B[rows] = scaling.of(config, name) * part
            if part.shape[1] != lora_A.shape[0]:
                raise ValueError("A and B differ in rank")
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"incomplete or ill-shaped LoRA of {name!r}: {error}") from error
        experts.setdefault(expert, []).append((lora_A, lora_B))
    return _padded([_joined(experts[expert]) for expert in sorted(experts)])


def _parts(projection: str, where: ExpertParameter, outputs: int) -> list[tuple[str, slice]]:
    if projection != FUSED:
        return [(projection, slice(0, outputs))]
    half = outputs // 2
    rows = (
        (slice(0, outputs, 2), slice(1, outputs, 2))
        if where.interleaved
        else (slice(0, half), slice(half, outputs))
    )
    return list(zip(PARTS, rows, strict=True))


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A and B of one expert."""
    first = parts[0][0]
    if all(torch.equal(first, lora_A) for lora_A, _ in parts):
        return first, torch.stack([lora_B for _, lora_B in parts]).sum(dim=0)
    return torch.cat([lora_A for lora_A, _ in parts]), torch.cat([b for _, b in parts], dim=1)


def _padded(experts: list[tuple[Tensor, Tensor]]) -> Factors:
    """Stack experts of different ranks."""
    widths = {lora_A.shape[1] for lora_A, _ in experts}
    if len(widths) > 1:
        raise CheckpointError(f"the PEFT adapter has experts of different features, {widths}")
    rank = max(len(lora_A) for lora_A, _ in experts)
    lora_A = experts[0][0].new_zeros(len(experts), rank, *widths)
    lora_B = experts[0][1].new_zeros(len(experts), len(experts[0][1]), rank)
    for index, (a, b) in enumerate(experts):
        lora_A[index, : len(a)], lora_B[index, :, : len(a)] = a, b
    return Factors(lora_A, lora_B)
