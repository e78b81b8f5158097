"""How many directions an expert's rank dimensions really use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import drlora_torch
from benchmarks.quality.profiling import Arrays


def effective_ranks(adapter: drlora_torch.Adapter) -> Arrays:
    """Effective rank of B A of every expert by layer, [N], averaged over projections."""
    return {
        name: np.mean(
            [
                [
                    _effective_rank(slots.lora_A[owned], slots.lora_B[owned])
                    for expert in range(layer.lora.table.num_experts)
                    for owned in [np.flatnonzero(layer.lora.table.owner == expert)]
                ]
                for _, slots in layer.lora.items()
            ],
            axis=0,
        )
        for name, layer in adapter.layers.items()
    }


@torch.no_grad()
def _effective_rank(A: Tensor, B: Tensor) -> float:
    """exp of the entropy of the squared singular values: 1 if all rows are multiples of one.

    r if all singular values are equal; 0 if B A is 0. A [r, I], B [r, O].

    Example:
        >>> A, B = torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, 0.0]))
        >>> round(_effective_rank(A, B), 3)
        2.0
    """
    energy = torch.linalg.svdvals(B.double().T @ A.double()) ** 2
    if not energy.any():
        return 0.0
    share = energy / energy.sum()
    return float(torch.special.entr(share).sum().exp())
