"""The LoRA of one projection as kernels take it.

Shape letters: N experts, I input and O output features, P rank slots,
R largest rank of an expert now, rounded up.
"""

from __future__ import annotations

import dataclasses
import enum
import functools

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


@dataclasses.dataclass(frozen=True, eq=False)
class Owned:
    """The slots of each expert in the order of its rank dimensions.

    It changes at growth events alone.
    """

    host: tuple[IntArray, IntArray]
    """All slots with an owner, as :meth:`SlotTable.active` orders them, and ranks [N]."""
    active: Tensor
    """The former, int64."""
    table: Tensor
    """By expert, int64 [N, R], -1 behind an expert's slots."""
    ranks: Tensor
    """How many these are, int64 [N]."""
    experts: slice = dataclasses.field(default_factory=lambda: slice(None))
    """Of those on the host, the experts that the other two speak of."""

    @classmethod
    def of(cls, table: SlotTable, device: torch.device) -> Owned:
        """Upload the slots of a layer."""
        active, ranks = table.active(), table.ranks()
        width = max(1, -(-int(ranks.max()) // ROUNDED)) * ROUNDED
        padded = np.full((ranks.size, width), -1, dtype=np.int64)
        padded[np.arange(width) < ranks[:, None]] = active
        flat = torch.from_numpy(np.concatenate([ranks, active, padded.reshape(-1)])).to(device)
        sizes = [ranks.size, active.size, padded.size]
        few, every, wide = flat.split_with_sizes(sizes)
        return cls((active, ranks), every, wide.view(padded.shape), few)

    def of_experts(self, experts: slice) -> Owned:
        """Those of some experts, for the kernels."""
        return Owned(self.host, self.active, self.table[experts], self.ranks[experts], experts)

    @property
    def width(self) -> int:
        """R."""
        return self.table.shape[1]

    @functools.cached_property
    def slots(self) -> list[slice | Tensor | None]:
        """By expert; a slice where they lie side by side, None without a slot."""
        active, ranks = self.host
        each = np.split(active, np.cumsum(ranks)[:-1])[self.experts]
        return [_as_slice(owned, self.table.device) for owned in each]


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
