"""The names that a model's checkpoints give to its experts, as Transformers itself converts them.

Transformers 5 fuses experts when it reads a checkpoint and splits them again when it writes one.
Engines that serve a checkpoint need the names in it. To find them, small tensors of numbers pass
through the conversion that saves weights, and the numbers tell which row went where.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from drlora_torch.models.wrappers import unwrapped


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
    """[N, O, I], or [N, I, O] if transposed."""
    transposed: bool

    @property
    def outputs(self) -> int:
        return self.shape[2 if self.transposed else 1]


def unfused(model: nn.Module, fused: Mapping[str, Fused]) -> dict[str, list[Place]]:
    """Places of each parameter by its name; those that stay fused on disk are left out."""
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        return {}
    names = list(fused)
    markers = {name: _marker(fused[name], index) for index, name in enumerate(names)}
    try:
        saved = revert_weight_conversion(model, markers)
    except (RuntimeError, ValueError, LookupError, AttributeError):
        return {}  # a conversion that needs more of the model than its experts
    places: dict[str, list[Place]] = {name: [] for name in names}
    for name, marker in saved.items():
        if marker.dim() != 2:
            continue
        numbers = list(dict.fromkeys(marker.flatten().long().tolist()))  # without the second column
        index, first = divmod(numbers[0], 2**32)
        rows = tuple(number - numbers[0] + first % 4 for number in numbers)
        parameter = names[index]
        if (part := _part(rows, fused[parameter].outputs)) is not None:
            places[parameter].append(Place(name.removesuffix(".weight"), first // 4, part))
    return {name: found for name, found in places.items() if _is_whole(found, fused[name])}


def revert_names(model: PreTrainedModel, modules: Iterable[str]) -> dict[str, str]:
    """Names of Linears in the model's checkpoints, by their names in the model."""
    names = list(modules)
    weights = {f"{name}.weight": torch.tensor(index) for index, name in enumerate(names)}
    try:
        saved = revert_weight_conversion(model, weights)
    except (RuntimeError, ValueError, LookupError, AttributeError):
        return dict(zip(names, names, strict=True))
    return {names[int(index)]: name.removesuffix(".weight") for name, index in saved.items()}


def _marker(parameter: Fused, index: int) -> Tensor:
    """Encode parameter, expert and row as numbers: four rows per expert, two equal columns.

    Two columns, because Transformers before 5.23 squeezes dimensions of size 1.
    """
    experts = parameter.shape[0]
    numbers = torch.arange(4 * experts, dtype=torch.float64) + index * 2**32
    numbers = numbers.view(experts, 4, 1).repeat(1, 1, 2)
    return numbers.transpose(1, 2).contiguous() if parameter.transposed else numbers


def _part(rows: tuple[int, ...], outputs: int) -> slice | None:
    """The part of a projection that some of its four rows stand for."""
    half = outputs // 2
    return {
        (0, 1, 2, 3): slice(0, outputs),
        (0, 1): slice(0, half),
        (2, 3): slice(half, outputs),
        (0, 2): slice(0, outputs, 2),
        (1, 3): slice(1, outputs, 2),
    }.get(rows)


def _is_whole(places: list[Place], parameter: Fused) -> bool:
    """Every row of every expert has one place."""
    outputs = range(parameter.outputs)
    rows = sum(len(outputs[place.rows]) for place in places)
    return rows == parameter.shape[0] * parameter.outputs
