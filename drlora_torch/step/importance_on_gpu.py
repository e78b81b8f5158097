"""The importance of the rows of a parameter in one pass over it and its gradient.

Shape letters: P rows, F features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024


@triton.jit
def _mean_sensitivity(weights, gradient, found, features, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((columns,), dtype=tl.float32)
    for at in range(0, features, columns):
        feature = at + tl.arange(0, columns)
        place = row * features + feature
        w = tl.load(weights + place, mask=feature < features, other=0.0).to(tl.float32)
        g = tl.load(gradient + place, mask=feature < features, other=0.0).to(tl.float32)
        total += tl.abs(w * g)
    tl.store(found + row, (tl.sum(total) / features).to(tl.float64))


def mean_sensitivity(weights: Tensor, gradient: Tensor) -> Tensor:
    """mean |w * dL/dw| of every row, [P, F] -> float64 [P]; summed in float32."""
    count, features = weights.shape
    found = torch.empty(count, dtype=torch.float64, device=weights.device)
    columns = min(COLUMNS, triton.next_power_of_2(features))
    _mean_sensitivity[(count,)](weights, gradient, found, features, columns=columns)
    return found
