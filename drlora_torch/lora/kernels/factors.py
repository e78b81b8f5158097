"""The LoRA of one projection as kernels take it.

Shape letters: N experts, I input and O output features, P rank slots, R padded rank.
"""

from __future__ import annotations

import dataclasses
import enum

from torch import Tensor


class Kernel(str, enum.Enum):
    """Which code multiplies the experts; results are equal to rounding."""

    AUTO = "auto"
    """``grouped`` on GPUs from Ampere on where it takes the weights, else ``ragged``."""
    RAGGED = "ragged"
    """A loop over experts on slices: the one for CPUs; takes every dtype and shape."""
    GROUPED = "grouped"
    """``torch.nn.functional.grouped_mm`` over padded ranks: the one for GPUs."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LoRAFactors:
    """The LoRA of one projection: its storage, and which slots each expert owns."""

    lora_A: Tensor  # [P, I]
    lora_B: Tensor  # [P, O]
    slots: list[slice | Tensor | None]
    """By expert, in the order of its rank dimensions; a slice where they lie side by side."""
    padded: Tensor
    """The same as int64 [N, R], -1 behind an expert's slots; R is a multiple of 8."""
    scaling: float
    dropout: float
    """Probability of dropping an input of the low-rank part; 0 outside training."""
    kernel: Kernel
