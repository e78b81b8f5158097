"""The LoRA of one projection as kernels take it.

Shape letters: N experts, I input and O output features, P rank slots,
R largest rank of an expert now, rounded up.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drlora_torch.lora.slots import IntArray, SlotTable

ROUNDED = 8
"""R is a multiple of it: grouped_mm takes rows of 16 bytes."""


class Kernel(str, enum.Enum):
    """Which code multiplies the experts; results are equal to rounding."""

    AUTO = "auto"
    """``grouped`` on GPUs from Ampere on where it takes the weights, else ``ragged``."""
    RAGGED = "ragged"
    """A loop over experts on slices: the one for CPUs; takes every dtype and shape."""
    GROUPED = "grouped"
    """``torch.nn.functional.grouped_mm``, and the LoRA by expert: the one for GPUs."""


class Owned(NamedTuple):
    """The slots of each expert in the order of its rank dimensions.

    It changes at growth events alone.
    """

    slots: list[slice | Tensor | None]
    """By expert; a slice where they lie side by side, None without a slot."""
    table: Tensor
    """The same as int64 [N, R], -1 behind an expert's slots."""
    ranks: Tensor
    """How many these are, int32 [N]."""
    active: Tensor
    """All of them, as :meth:`SlotTable.active` orders them, int64."""

    @property
    def width(self) -> int:
        """R."""
        return self.table.shape[1]

    @classmethod
    def of(cls, table: SlotTable, device: torch.device) -> Owned:
        """Upload the slots of a layer."""
        active, ranks = table.active(), table.ranks()
        width = max(1, -(-int(ranks.max()) // ROUNDED)) * ROUNDED
        padded = np.full((ranks.size, width), -1, dtype=np.int64)
        padded[np.arange(width) < ranks[:, None]] = active
        slots = [_as_slice(owned, device) for owned in np.split(active, np.cumsum(ranks)[:-1])]
        arrays = (padded, ranks.astype(np.int32), active)
        uploaded = (torch.from_numpy(each).to(device) for each in arrays)
        return cls(slots, *uploaded)

    def of_experts(self, experts: slice) -> Owned:
        """Those of some experts, for the kernels."""
        return Owned(self.slots[experts], self.table[experts], self.ranks[experts], self.active)


def _as_slice(slots: IntArray, device: torch.device) -> slice | Tensor | None:
    """The slots of an expert as a slice where they lie side by side: a view costs no copy."""
    if not slots.size:
        return None
    if (np.diff(slots) == 1).all():
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return torch.from_numpy(slots).to(device)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LoRAFactors:
    """The LoRA of one projection: its storage, and which slots each expert owns."""

    lora_A: Tensor  # [P, I]
    lora_B: Tensor  # [P, O]
    owned: Owned
    scaling: float
    dropout: float
    """Probability of dropping an input of the low-rank part; 0 outside training."""
    kernel: Kernel
