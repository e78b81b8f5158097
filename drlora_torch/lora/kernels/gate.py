"""The gate of most experts, silu(gate) * up, in one pass over its rows, forward and backward.

torch reads and writes them several times, and keeps silu(gate) for backward.

Shape letters: S rows, I features of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

COLUMNS = 1024


@triton.jit
def _forward(rows, output, features, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = feature < features
    place = rows + row * 2 * features + feature
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + features, mask=inside, other=0.0).to(tl.float32)
    found = gate * tl.sigmoid(gate) * up
    tl.store(output + row * features + feature, found.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward(rows, grad, d_rows, features, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = feature < features
    place = row * 2 * features + feature
    gate = tl.load(rows + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(rows + place + features, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * features + feature, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    d_gate = g * up * share * (1.0 + gate * (1.0 - share))
    d_up = g * gate * share
    tl.store(d_rows + place, d_gate.to(d_rows.dtype.element_ty), mask=inside)
    tl.store(d_rows + place + features, d_up.to(d_rows.dtype.element_ty), mask=inside)


class _SiluAndMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        count, features = rows.shape[0], rows.shape[1] // 2
        output = rows.new_empty(count, features)
        columns = min(COLUMNS, triton.next_power_of_2(features))
        grid = (count, triton.cdiv(features, columns))
        _forward[grid](rows, output, features=features, columns=columns)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        count, features = grad.shape
        d_rows = torch.empty_like(rows)
        columns = min(COLUMNS, triton.next_power_of_2(features))
        grid = (count, triton.cdiv(features, columns))
        _backward[grid](rows, grad.contiguous(), d_rows, features=features, columns=columns)
        return d_rows


def silu_and_multiply(rows: Tensor) -> Tensor:
    """silu(gate) * up of rows [S, 2I] that hold gate, then up: [S, I]."""
    output: Tensor = _SiluAndMultiply.apply(rows.contiguous())
    return output
