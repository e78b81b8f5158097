"""The names that a model's checkpoints give to its experts, as Transformers itself converts them.

Transformers 5 fuses experts when it reads a checkpoint and takes them apart again when it writes
one. Engines that serve the checkpoint go by the names in it, so those are asked for: small tensors
of numbers take the way that weights take when they are saved, and the numbers tell what went where.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

ALL, FIRST_HALF, SECOND_HALF, EVEN, ODD = (0, 1, 2, 3), (0, 1), (2, 3), (0, 2), (1, 3)
"""Of four rows of an expert; more than four are told apart no better."""


class Place(NamedTuple):
    """A two-dimensional weight of one expert: a projection, or one part of a fused one."""

    name: str
    """Name of the module that has it."""
    expert: int
    rows: slice
    """Its rows of the projection's [O, I]."""


class Fused(NamedTuple):
    """A parameter of all experts."""

    shape: tuple[int, ...]
    """As the model keeps it: [N, O, I] or [N, I, O]."""
    transposed: bool

    @property
    def outputs(self) -> int:
        """O."""
        return self.shape[2 if self.transposed else 1]


def unfused(model: nn.Module, fused: Mapping[str, Fused]) -> dict[str, list[Place]]:
    """Places of each parameter by its name; those that stay fused on disk are left out."""
    inside = getattr(model, "get_base_model", None)  # of a PeftModel
    base: Any = model if inside is None else inside()
    if not isinstance(base, PreTrainedModel):
        return {}
    names = list(fused)
    markers = {name: _marker(fused[name], index) for index, name in enumerate(names)}
    try:
        saved = revert_weight_conversion(base, markers)
    except (RuntimeError, ValueError, LookupError, AttributeError):
        return {}  # a conversion that needs more of the model than its experts
    places: dict[str, list[Place]] = {}
    for name, marker in saved.items():
        if marker.dim() != 2:
            continue
        index, expert, rows = _read(marker)
        place = _place(name, expert, rows, fused[names[index]].outputs)
        if place is not None:
            places.setdefault(names[index], []).append(place)
    return {name: found for name, found in places.items() if _is_whole(found, fused[name])}


def _marker(parameter: Fused, index: int) -> Tensor:
    """Encode parameter, expert and row as numbers: four rows per expert, two equal columns.

    Two columns, because Transformers before 5.23 squeezes dimensions of size 1.
    """
    experts = parameter.shape[0]
    numbers = torch.arange(4 * experts, dtype=torch.float64) + index * 2**32
    numbers = numbers.view(experts, 4, 1).repeat(1, 1, 2)
    return numbers.transpose(1, 2).contiguous() if parameter.transposed else numbers


def _read(marker: Tensor) -> tuple[int, int, tuple[int, ...]]:
    numbers = list(dict.fromkeys(marker.flatten().long().tolist()))  # without the second column
    first = numbers[0]
    rows = tuple(number - first + first % 4 for number in numbers)
    return first >> 32, (first % 2**32) // 4, rows


def _place(name: str, expert: int, rows: tuple[int, ...], outputs: int) -> Place | None:
    half = outputs // 2
    slices = {
        ALL: slice(0, outputs),
        FIRST_HALF: slice(0, half),
        SECOND_HALF: slice(half, outputs),
        EVEN: slice(0, outputs, 2),
        ODD: slice(1, outputs, 2),
    }
    found = slices.get(rows)
    return None if found is None else Place(name.removesuffix(".weight"), expert, found)


def _is_whole(places: list[Place], parameter: Fused) -> bool:
    """Every row of every expert has one place."""
    outputs = range(parameter.outputs)
    rows = sum(len(outputs[place.rows]) for place in places)
    return rows == parameter.shape[0] * parameter.outputs
