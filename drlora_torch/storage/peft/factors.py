"""The LoRA of one projection with the same rank for every expert: padded, or compressed by SVD.

Shape letters: N experts, R the common rank, I and O input and output features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drlora_torch.lora.layers import ExpertLoRA, SlotLoRA


class Factors(NamedTuple):
    """A [N, R, I] and B [N, O, R]; dimensions beyond an expert's own rank are 0."""

    lora_A: Tensor
    lora_B: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_A.shape[1]


class Uniform(NamedTuple):
    """Factors of one rank, and what they lost."""

    factors: Factors
    error: NDArray[np.float64]
    """Relative Frobenius error of B A of each expert, [N]; 0 where nothing was lost."""


@torch.no_grad()
def padded(lora: ExpertLoRA, projection: str) -> Factors:
    """Zero-pad the factors of every expert to the layer's largest rank (at least 1)."""
    slots = lora.projections[projection]
    assert isinstance(slots, SlotLoRA)
    ranks = lora.table.ranks()
    experts, rank = ranks.size, max(int(ranks.max()), 1)
    lora_A = torch.zeros(experts, rank, slots.shape.in_features, dtype=slots.lora_A.dtype)
    lora_B = torch.zeros(experts, slots.shape.out_features, rank, dtype=slots.lora_B.dtype)
    active = lora.table.active()
    owner, position = (
        torch.from_numpy(each[active]) for each in (lora.table.owner, lora.table.position)
    )
    lora_A[owner, position] = slots.lora_A.detach().cpu()[active]
    lora_B[owner, :, position] = slots.lora_B.detach().cpu()[active]
    return Factors(lora_A, lora_B)


@torch.no_grad()
def of_rank(factors: Factors, rank: int) -> Uniform:
    """Bring every expert to one rank: zeros where it has less, the best approximation where more.

    The best approximation of a rank (Eckart-Young) cuts the singular value decomposition of B A,
    computed on the small factors of its QR decompositions: B A = Q_B (R_B R_A^T) Q_A^T. An expert
    that fits keeps its A and B as they are.
    """
    experts, own, inputs = factors.lora_A.shape
    lora_A = factors.lora_A.new_zeros(experts, rank, inputs)
    lora_B = factors.lora_B.new_zeros(experts, factors.lora_B.shape[1], rank)
    error = np.zeros(experts)
    for expert in range(experts):
        a, b = factors.lora_A[expert], factors.lora_B[expert]
        if own > rank:
            used = (a != 0).any(dim=1) & (b != 0).any(dim=0)
            a, b = a[used], b[:, used]
        if len(a) <= rank:
            lora_A[expert, : len(a)], lora_B[expert, :, : len(a)] = a, b
            continue
        u, s, v = _decomposed(a.double(), b.double())
        kept = min(rank, s.numel())
        root = s[:kept].sqrt()
        lora_A[expert, :kept] = (root.unsqueeze(1) * v[:, :kept].T).to(a)
        lora_B[expert, :, :kept] = (u[:, :kept] * root).to(b)
        error[expert] = float(s[kept:].norm() / s.norm())
    return Uniform(Factors(lora_A, lora_B), error)


def _decomposed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of b @ a, with no more singular values than a has rows."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, q_a @ v_t.T
