"""Packed weights in a module: which of its tensors are one weight, and how they are read.

The module keeps them as frozen parameters, so that they are moved, sharded and saved as any other.

Shape letters: N experts, I input and O output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from drlora_torch.errors import ModelError
from drlora_torch.lora.stored import Stored
from drlora_torch.quantized.scaled import FP8, ScaledWeight

FORMATS = "_drlora_formats"
"""Set on a module that holds packed weights: their formats, by name."""
SCALE = "_scale_inv"
"""Suffix of the scales beside an FP8 weight, as Transformers names them."""
FP4_TILE = (1, 32)


class Format(Protocol):
    """How one weight is packed."""

    def empty(self, device: torch.device | str) -> dict[str, Tensor]:
        """Tensors of the right shapes and dtypes, by the suffix of their name."""

    def is_sound(self, holder: Any, name: str) -> bool:
        """True if the scales of a weight are finite numbers."""

    def open(self, tensors: tuple[Tensor, ...], transposed: bool) -> Stored:
        """The weight in such tensors, as the kernels take it."""


@dataclasses.dataclass(frozen=True, slots=True)
class MXFP4:
    """Blocks [N, O, groups, 16] and scales [N, O, groups], as gpt-oss checkpoints have them."""

    shape: tuple[int, int, int]
    """(N, O, I)."""

    def empty(self, device: torch.device | str) -> dict[str, Tensor]:
        """Tensors of the right shapes, by the suffix of their name."""
        count, rows, columns = self.shape
        groups = columns // FP4_TILE[1]
        return {
            "_blocks": torch.empty(count, rows, groups, 16, dtype=torch.uint8, device=device),
            "_scales": torch.empty(count, rows, groups, dtype=torch.uint8, device=device),
        }

    def is_sound(self, holder: Any, name: str) -> bool:
        """True if no scale is 255, which stands for no number."""
        return bool((getattr(holder, name + "_scales") != 255).all())

    def open(self, tensors: tuple[Tensor, ...], transposed: bool) -> ScaledWeight:
        """Take such tensors as a weight of the kernels."""
        blocks, scales = tensors
        return ScaledWeight((blocks.flatten(-2), scales), "mxfp4", FP4_TILE)


def formats(module: nn.Module) -> dict[str, Format]:
    """The packed weights that were put into a module, by name."""
    return cast("dict[str, Format]", vars(module).get(FORMATS, {}))


def suffixes(module: Any, name: str) -> list[str]:
    """What is put behind the name of a weight for each tensor that holds it."""
    if (form := formats(module).get(name)) is not None:
        return list(form.empty("meta"))
    scales = (SCALE, "_activation_scale")
    return ["", *(each for each in scales if hasattr(module, name + each))]


def declare(module: nn.Module, name: str, form: Format, tensors: Mapping[str, Tensor]) -> None:
    """Replace a weight of a module by packed tensors, named by their suffixes."""
    delattr(module, name)
    for suffix, tensor in tensors.items():
        module.register_parameter(name + suffix, nn.Parameter(tensor, requires_grad=False))
    vars(module)[FORMATS] = {**formats(module), name: form}


def restore(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Replace the packed tensors of a weight by the weight."""
    kept = formats(module)
    for suffix in kept[name].empty("meta"):
        delattr(module, name + suffix)
    module.register_parameter(name, weight)
    vars(module)[FORMATS] = {other: form for other, form in kept.items() if other != name}
    if not vars(module)[FORMATS]:
        delattr(module, FORMATS)


def converted(module: Any, name: str) -> str | None:
    """Say that the codes of a weight with scales were taken for numbers; None if they were not."""
    weight = getattr(module, name, None)
    if not hasattr(module, name + SCALE) or not isinstance(weight, Tensor):
        return None
    if weight.dtype in (FP8, torch.int8):
        return None
    return (
        f"has the codes of FP8 as {weight.dtype} numbers, without their scales: something has "
        "converted the model (model.to(dtype), or mixed precision of fully_shard); load it again "
        "and leave its dtype"
    )


def open_weight(module: Any, name: str, transposed: bool) -> Stored | None:
    """A packed weight of a module; None for one that is not packed, or in an unknown way.

    Raises:
        ModelError: its codes have been converted.
    """
    if (form := formats(module).get(name)) is not None:
        tensors = tuple(getattr(module, name + suffix) for suffix in form.empty("meta"))
        return form.open(tensors, transposed)
    weight, scales = getattr(module, name, None), getattr(module, name + SCALE, None)
    if not (isinstance(weight, Tensor) and isinstance(scales, Tensor)) or transposed:
        return None
    if (reason := converted(module, name)) is not None:
        raise ModelError(f"its {name} {reason}")
    if weight.dtype is torch.int8:
        return ScaledWeight((weight, scales), "fp4", FP4_TILE)
    if weight.dtype is FP8:
        tile = getattr(module, "block_size", None) or weight.shape[1:]
        return ScaledWeight((weight, scales), "fp8", tuple(tile))
    return None
