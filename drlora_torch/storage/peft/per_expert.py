"""One LoRA per expert and projection, two-dimensional, under the names of unfused experts.

``{expert}.gate_proj.lora_A.weight`` [R, I] and ``lora_B.weight`` [O, R], likewise for the others:
what engines read that serve models by the names of their checkpoints. Parts of a fused projection
get the same A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drlora_torch.errors import CheckpointError
from drlora_torch.lora.layers import ProjectionShape
from drlora_torch.models.checkpoint_names import Place
from drlora_torch.storage.peft.factors import Expert, Factors
from drlora_torch.storage.peft.files import scaling_of
from drlora_torch.storage.peft.places import PREFIX


def tensors(places: Sequence[Place], factors: Factors, ranks: Sequence[int]) -> dict[str, Tensor]:
    """Two-dimensional tensors; ``ranks`` has that of each expert, the rest is cut off."""
    named: dict[str, Tensor] = {}
    for name, expert, rows in places:
        rank = ranks[expert]
        named[f"{PREFIX}{name}.lora_A.weight"] = factors.lora_A[expert, :rank].clone()
        named[f"{PREFIX}{name}.lora_B.weight"] = factors.lora_B[expert, rows, :rank].clone()
    return named


def take(
    held: dict[str, Tensor],
    config: Mapping[str, Any],
    places: Sequence[Place],
    shape: ProjectionShape,
) -> list[Expert] | None:
    """Take the LoRA at some places out of ``held``, scaled for a scaling of 1; None if none is.

    Parts of an expert with one A share it, else their ranks add up.

    Raises:
        CheckpointError: some places have a LoRA and others do not, or none that fits.
    """
    if not any(f"{PREFIX}{place.name}.lora_A.weight" in held for place in places):
        return None
    experts: dict[int, list[Expert]] = {}
    for name, expert, rows in places:
        try:
            lora_A, part = (held.pop(f"{PREFIX}{name}.lora_{each}.weight") for each in "AB")
            lora_B = part.new_zeros(shape.out_features, part.shape[1])
            lora_B[rows] = scaling_of(config, name) * part
            if part.shape[1] != lora_A.shape[0]:
                raise ValueError("A and B differ in rank")
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"incomplete or ill-shaped LoRA of {name!r}: {error}") from error
        experts.setdefault(expert, []).append((lora_A, lora_B))
    return [_join(experts[expert]) for expert in sorted(experts)]


def _join(parts: Sequence[Expert]) -> Expert:
    """A and B of one expert."""
    all_A, all_B = zip(*parts, strict=True)
    if all(torch.equal(all_A[0], lora_A) for lora_A in all_A):
        return all_A[0], torch.stack(all_B).sum(dim=0)
    return torch.cat(all_A), torch.cat(all_B, dim=1)
