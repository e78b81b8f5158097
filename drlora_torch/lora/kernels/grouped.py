"""The kernel for GPUs: grouped matrix products, no loop and no waiting for the device.

``torch.nn.functional.grouped_mm`` multiplies all experts' rows at once. Ranks are padded with
zeros to the largest, and that to a multiple of 8, since its operands need strides of 16 bytes.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features, R padded rank.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout, grouped_mm

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels.factors import LoRAFactors
from drlora_torch.lora.stored import Stored

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes
GROUP_BYTES = 2**30
"""Most bytes of packed weights that are unpacked at once, as Transformers allows for FP8."""


def supports(shape: tuple[int, int, int], dtype: torch.dtype) -> bool:
    """True if ``grouped_mm`` takes weights (N, I, O): their dtype, and rows of 16 bytes."""
    aligned = all(size * dtype.itemsize % ALIGNMENT == 0 for size in shape[1:])
    return dtype in DTYPES and aligned


def expert_linear(
    inputs: Tensor,
    weight: Stored,
    bias: Tensor | None,
    lora: LoRAFactors | None,
    dispatch: Dispatch,
    gather: bool,
    routing_weights: Tensor | None,
) -> Tensor:
    """Compute :func:`drlora_torch.lora.kernels.expert_linear`."""
    dead = ~dispatch.live.unsqueeze(-1)
    # grouped_mm leaves the rows behind the last expert unwritten, forward and backward
    rows = (inputs[dispatch.tokens] if gather else inputs).masked_fill(dead, 0.0)
    output = _base(rows, weight, dispatch)
    if lora is not None:
        output = output + lora.scaling * _low_rank(rows, lora, dispatch, dead)
    output = output.masked_fill(dead, 0.0)
    if bias is not None:
        output = output + bias[dispatch.experts].to(output.dtype)
    return output if routing_weights is None else dispatch.combine(output, routing_weights)


def _base(rows: Tensor, weight: Stored, dispatch: Dispatch) -> Tensor:
    """x W^T of every row, [S, I] -> [S, O]."""
    if not weight.packed:
        matrices = weight.matrices(0, weight.shape[0], rows.dtype)
        return grouped_mm(rows, matrices, offs=dispatch.offsets)
    output: Tensor = _PackedProduct.apply(rows, weight, dispatch)  # type: ignore[no-untyped-call]
    return output


class _PackedProduct(torch.autograd.Function):
    """Rows times packed weights, unpacked a group of experts at a time; differentiable in rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Stored, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(*weight.tensors)
        ctx.weight, ctx.dispatch = dataclasses.replace(weight, tensors=()), dispatch
        return _by_groups(rows, weight, dispatch, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = dataclasses.replace(ctx.weight, tensors=tuple(ctx.saved_tensors))
        return _by_groups(grad.contiguous(), weight, ctx.dispatch, transposed=True), None, None


def _by_groups(rows: Tensor, weight: Stored, dispatch: Dispatch, *, transposed: bool) -> Tensor:
    """Rows times the weights, [S, I] -> [S, O], or times the transposed ones, [S, O] -> [S, I].

    One group, where all experts fit into it, does not wait for the device.
    """
    count, *features = weight.shape
    itemsize = max(rows.dtype.itemsize, (weight.dtype or rows.dtype).itemsize)
    size = max(1, GROUP_BYTES // (math.prod(features) * itemsize))
    if size >= count:
        return grouped_mm(rows, _chosen(weight, 0, count, rows, transposed), offs=dispatch.offsets)
    output = rows.new_zeros(rows.shape[0], features[0 if transposed else 1])
    ends = [0, *itertools.accumulate(dispatch.counts[:-1])]
    for first in range(0, count, size):
        last = min(first + size, count)
        start, stop = ends[first], ends[last]
        if start < stop:
            offsets = dispatch.offsets[first:last] - start
            group = _chosen(weight, first, last, rows, transposed)
            output[start:stop] = grouped_mm(rows[start:stop], group, offs=offsets)
            del group  # before the next one is unpacked
    return output


def _chosen(weight: Stored, first: int, last: int, rows: Tensor, transposed: bool) -> Tensor:
    matrices = weight.matrices(first, last, rows.dtype)
    return matrices.transpose(1, 2) if transposed else matrices


def _low_rank(rows: Tensor, lora: LoRAFactors, dispatch: Dispatch, dead: Tensor) -> Tensor:
    """(x A^T) B of every row, [S, I] -> [S, O]."""
    lora_A = _padded(lora.lora_A, lora.padded).to(rows.dtype)  # [N, R, I]
    lora_B = _padded(lora.lora_B, lora.padded).to(rows.dtype)  # [N, R, O]
    read = dropout(rows, lora.dropout) if lora.dropout else rows
    low = grouped_mm(read, lora_A.transpose(1, 2), offs=dispatch.offsets).masked_fill(dead, 0.0)
    return grouped_mm(low, lora_B, offs=dispatch.offsets)


def _padded(storage: Tensor, slots: Tensor) -> Tensor:
    """Rows of the slots [N, R] of each expert, [N, R, .]; zeros for slot -1."""
    return storage[slots.clamp(min=0)] * (slots >= 0).unsqueeze(-1)
