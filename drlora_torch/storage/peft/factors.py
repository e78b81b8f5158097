"""The LoRA of one projection: read from the slots, brought to one rank, and written back.

Shape letters: N experts, R the common rank, r the rank of one expert, I and O input and output
features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drlora_torch.errors import CheckpointError
from drlora_torch.lora.layers import ExpertLoRA, SlotLoRA
from drlora_torch.lora.slots import IntArray
from drlora_torch.storage.finite import DIVERGED, is_finite

Expert = tuple[Tensor, Tensor]
"""A [r, I] and B [O, r] of one expert."""
FloatArray = NDArray[np.float64]


class Factors(NamedTuple):
    """The factors of all experts at one rank; dimensions beyond an expert's own rank are 0."""

    lora_A: Tensor  # [N, R, I]
    lora_B: Tensor  # [N, O, R]


def read_slots(lora: ExpertLoRA, slots: SlotLoRA) -> list[Expert]:
    """The factors of every expert at its own rank, on the CPU."""
    lora_A, lora_B = slots.lora_A.detach().cpu(), slots.lora_B.detach().cpu()
    owned = np.split(lora.table.active(), np.cumsum(lora.table.ranks())[:-1])
    return [(lora_A[own], lora_B[own].T) for own in owned]


@torch.no_grad()
def write_slots(lora: ExpertLoRA, slots: SlotLoRA, factors: Factors) -> None:
    """Write the factors; rank dimensions in which B is 0 keep their fresh rows of A."""
    active = lora.table.active()
    owner, position = lora.table.owner[active], lora.table.position[active]
    rows, columns = factors.lora_A[owner, position], factors.lora_B[owner, :, position]
    filled = (columns != 0).any(dim=1)
    index = torch.from_numpy(active)[filled].to(lora.device)
    slots.lora_A[index] = rows[filled].to(slots.lora_A)
    slots.lora_B[index] = columns[filled].to(slots.lora_B)


def check_fits(where: str, values: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Refuse imported values, already scaled, that are not finite in the dtype they come into."""
    if not all(is_finite(each, dtype) for each in values):
        raise CheckpointError(
            f"{where}: the PEFT adapter, scaled for this one, holds {DIVERGED} in {dtype}"
        )


def resize(experts: Sequence[Expert], ranks: int | IntArray) -> tuple[Factors, FloatArray]:
    """Bring experts to a rank, or each to its own [N]: pad with zeros, or best approximate B A.

    Also returns the relative Frobenius error of each expert's B A, [N]. It is 0 for an expert that
    fits, which keeps its A and B.
    """
    first_A, first_B = experts[0]
    each = np.broadcast_to(ranks, len(experts)).tolist()
    lora_A = first_A.new_zeros(len(experts), max(each), first_A.shape[1])
    lora_B = first_B.new_zeros(len(experts), first_B.shape[0], max(each))
    error = np.zeros(len(experts))
    truncate = any(len(a) > rank for (a, _), rank in zip(experts, each, strict=True))
    for expert, (factors, rank) in enumerate(zip(experts, each, strict=True)):
        a, b = factors
        if truncate:
            used = (a != 0).any(dim=1) & (b != 0).any(dim=0)
            a, b = a[used], b[:, used]
        if len(a) > rank:
            a, b, error[expert] = _truncate(a, b, rank)
        lora_A[expert, : len(a)], lora_B[expert, :, : len(a)] = a, b
    return Factors(lora_A, lora_B), error


def _truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A at a lower rank (Eckart-Young), and its relative error.

    It truncates the singular value decomposition, which is computed on the small factors of two QR
    decompositions: B A = Q_B (R_B R_A^T) Q_A^T.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    kept_A = root.unsqueeze(1) * (q_a @ v_t.T)[:, :rank].T
    kept_B = (q_b @ u)[:, :rank] * root
    return kept_A.to(a), kept_B.to(b), float(s[rank:].norm() / s.norm())
