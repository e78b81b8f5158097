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

from drlora_torch.attached import AdaptedLayer, Attached
from drlora_torch.errors import CheckpointError
from drlora_torch.models.checkpoint_names import Fused, Place, unfused
from drlora_torch.models.conventions import convention_of
from drlora_torch.models.location import ExpertLinears
from drlora_torch.storage.peft.factors import Expert, Factors
from drlora_torch.storage.peft.files import PREFIX, joined, own_name, scaling_of
from drlora_torch.storage.peft.stacked import parameters_of, qualified


def namings(attached: Attached) -> dict[tuple[str, str], list[list[Place]]]:
    """The places of every layer and projection under each naming, preferred naming first.

    Transformers is asked for the names that its checkpoints have; experts that stay fused there
    have only those of :func:`own_places`.
    """
    fused, keys = {}, {}
    for name, layer in attached.layers.items():
        for projection, where in parameters_of(layer).items():
            weight = getattr(layer.experts.get_submodule(where.module), where.name)
            if weight.dim() == 3:
                keys[name, projection] = key = qualified(layer, where)
                fused[key] = Fused(tuple(weight.shape), where.transposed)
    on_disk = unfused(attached.model, fused)
    found = {}
    for name, layer in attached.layers.items():
        for projection, _ in layer.lora.items():
            named = on_disk.get(keys.get((name, projection), ""), [])
            adapted = [place for place in named if place.expert < layer.record.num_experts]
            own = own_places(layer, projection)
            found[name, projection] = [adapted, own] if adapted else [own]
    return found


def own_places(layer: AdaptedLayer, projection: str) -> list[Place]:
    """Places under the names that the model itself has, or would have if it were not fused.

    Fused experts get ``{experts}.{i}.gate_proj``, ``up_proj`` and ``down_proj``, or the
    projection's own name.
    """
    name = own_name(layer.record.name)
    where = convention_of(layer.experts).location(layer.experts, projection)
    outputs = layer.record.projections[projection].out_features
    parts = [(projection, slice(0, outputs))]
    if isinstance(where, ExpertLinears):
        return [
            Place(joined(name, expert, where.projection), index, slice(0, outputs))
            for index, expert in enumerate(where.experts)
        ]
    if projection == "gate_up_proj":
        half = outputs // 2
        gate, up = slice(0, half), slice(half, outputs)
        if where.interleaved:
            gate, up = slice(0, outputs, 2), slice(1, outputs, 2)
        parts = [("gate_proj", gate), ("up_proj", up)]
    parent = joined(name, where.module if where.name == projection else "")
    return [
        Place(joined(parent, str(expert), part), expert, rows)
        for expert in range(layer.record.num_experts)
        for part, rows in parts
    ]


def tensors(places: Sequence[Place], factors: Factors, ranks: Sequence[int]) -> dict[str, Tensor]:
    """Two-dimensional tensors; ``ranks`` has that of each expert, the rest is cut off."""
    named: dict[str, Tensor] = {}
    for name, expert, rows in places:
        rank = ranks[expert]
        named[f"{PREFIX}{name}.lora_A.weight"] = factors.lora_A[expert, :rank].clone()
        named[f"{PREFIX}{name}.lora_B.weight"] = factors.lora_B[expert, rows, :rank].clone()
    return named


def take(
    held: dict[str, Tensor], config: Mapping[str, Any], places: Sequence[Place], outputs: int
) -> list[Expert]:
    """Take the LoRA at some places out of ``held``, scaled for a scaling of 1; empty if none is."""
    if not any(f"{PREFIX}{place.name}.lora_A.weight" in held for place in places):
        return []
    experts: dict[int, list[Expert]] = {}
    for name, expert, rows in places:
        try:
            lora_A, part = (held.pop(f"{PREFIX}{name}.lora_{each}.weight") for each in "AB")
            lora_B = part.new_zeros(outputs, part.shape[1])
            lora_B[rows] = scaling_of(config, name) * part
            if part.shape[1] != lora_A.shape[0]:
                raise ValueError("A and B differ in rank")
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"incomplete or ill-shaped LoRA of {name!r}: {error}") from error
        experts.setdefault(expert, []).append((lora_A, lora_B))
    return [_join(experts[expert]) for expert in sorted(experts)]


def _join(parts: Sequence[Expert]) -> Expert:
    """A and B of one expert: parts with the same A share it, else their ranks add up."""
    all_A, all_B = zip(*parts, strict=True)
    if all(torch.equal(all_A[0], lora_A) for lora_A in all_A):
        return all_A[0], torch.stack(all_B).sum(dim=0)
    return torch.cat(all_A), torch.cat(all_B, dim=1)
