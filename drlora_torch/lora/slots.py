"""Rank slots: which expert owns which row of a layer's LoRA storage. NumPy only, no weights.

Shapes: P rank slots of a layer, N experts, R = r_max. A layer's projections share one table.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FREE = -1


class Layout(str, enum.Enum):
    """Where a growing expert finds its slots."""

    POOLED = "pooled"
    """Any free slot serves any expert: P is the budget, so memory is that of uniform LoRA."""
    MASKED = "masked"
    """Slot s is reserved to expert s // r_max, P = N * r_max: the paper's storage."""


class Born(NamedTuple):
    """Slots that were just given to experts, int64 arrays of one length."""

    slots: IntArray
    experts: IntArray
    positions: IntArray


class SlotTable:
    """Owner and rank dimension of every slot.

    ``owner[s]`` is the expert of slot s, or ``FREE``; ``position[s]`` is the rank dimension j of
    that expert which the slot holds. The positions of an expert are always 0 .. r_i - 1.

    Example:
        >>> table = SlotTable(num_slots=4, num_experts=2, r_max=3, layout=Layout.POOLED)
        >>> table.grow(np.array([1, 1])).slots.tolist()
        [0, 1]
        >>> table.grow(np.array([2, 0])).slots.tolist(), table.ranks().tolist()
        ([2, 3], [3, 1])
        >>> table.active().tolist()
        [0, 2, 3, 1]
    """

    def __init__(self, num_slots: int, num_experts: int, r_max: int, layout: Layout) -> None:
        assert layout is Layout.POOLED or num_slots == num_experts * r_max
        self.num_experts = num_experts
        self.r_max = r_max
        self.layout = layout
        self.owner: IntArray = np.full(num_slots, FREE, dtype=np.int64)
        self.position: IntArray = np.full(num_slots, FREE, dtype=np.int64)

    @property
    def num_slots(self) -> int:
        return self.owner.size

    @property
    def is_empty(self) -> bool:
        """True if no slot has an owner."""
        return bool((self.owner == FREE).all())

    def ranks(self) -> IntArray:
        """r_i, slots that each expert owns, int64 [N]."""
        return np.bincount(self.owner[self.owner != FREE], minlength=self.num_experts)

    def active(self) -> IntArray:
        """Owned slots ordered by expert, then rank dimension, int64 [sum of ranks].

        Both layouts compute on slots in this order, so they give the same results.
        """
        free_first = np.argsort(self.owner * (self.r_max + 1) + self.position)  # FREE is below all
        return free_first[np.count_nonzero(self.owner == FREE) :]

    def grow(self, growth: IntArray) -> Born:
        """Give each expert ``growth[i]`` more slots, the lowest free ones that it may have."""
        experts = np.repeat(np.arange(self.num_experts), growth)
        ranks = self.ranks()
        first = np.repeat(np.cumsum(growth) - growth, growth)
        positions = ranks[experts] + np.arange(experts.size) - first
        if self.layout is Layout.POOLED:
            slots = np.flatnonzero(self.owner == FREE)[: experts.size]
        else:
            free = (self.owner == FREE).reshape(self.num_experts, self.r_max)
            slots = np.flatnonzero(free & (np.cumsum(free, axis=1) <= growth[:, None]))
        assert slots.size == experts.size, "the budget never exceeds the slots"
        assert (self.owner[slots] == FREE).all(), "a new slot is free"
        self.owner[slots], self.position[slots] = experts, positions
        return Born(slots, experts, positions)

    def cut(self, dimensions: NDArray[np.bool_]) -> IntArray:
        """Free the slots of the rank dimensions marked in [N, R]; later dimensions move down.

        Kept dimensions keep their slots, so with layout ``masked`` a slot's rank dimension is then
        no longer its offset in the expert's range.
        """
        owned = self.owner != FREE
        freed = np.zeros(self.num_slots, dtype=np.bool_)
        freed[owned] = dimensions[self.owner[owned], self.position[owned]]
        cut_before = np.cumsum(dimensions, axis=1)
        kept = owned & ~freed
        self.position[kept] -= cut_before[self.owner[kept], self.position[kept]]
        self.owner[freed] = self.position[freed] = FREE
        return np.flatnonzero(freed)

    def load(self, owner: IntArray, position: IntArray) -> None:
        """Take saved arrays of the same size, which were checked before."""
        assert owner.shape == position.shape == self.owner.shape
        self.owner, self.position = owner.copy(), position.copy()

    def per_dimension(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Arrange one value per slot [P] by expert and rank dimension [N, R], 0 where inactive."""
        owned = self.owner != FREE
        matrix = np.zeros((self.num_experts, self.r_max))
        matrix[self.owner[owned], self.position[owned]] = values[owned]
        return matrix
