"""The kernel for GPUs: grouped matrix products, no loop over experts, no waiting for the device.

``torch.nn.functional.grouped_mm`` multiplies all experts' rows at once; what else is done with the
rows is in :mod:`drlora_torch.lora.kernels.triton_rows`, or, where there is no Triton, in
:mod:`drlora_torch.lora.kernels.torch_rows`. Kept for backward: the inputs, x A^T, dropout's
factors, and no weight.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import torch_rows
from drlora_torch.lora.kernels.factors import Owned
from drlora_torch.lora.kernels.product import Gradients, Inputs, Kept, Product, draw_kept
from drlora_torch.lora.stored import Stored
from drlora_torch.lora.triton_use import runs_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes
GROUP_BYTES = 2**30
"""Most bytes of packed weights that are unpacked at once, as Transformers allows for FP8."""


def supports(shape: tuple[int, int, int], dtype: torch.dtype) -> bool:
    """True if ``grouped_mm`` takes weights (N, I, O): their dtype, and rows of 16 bytes."""
    aligned = all(size * dtype.itemsize % ALIGNMENT == 0 for size in shape[1:])
    return dtype in DTYPES and aligned


def low_dtype(inputs: torch.dtype, factor: torch.dtype) -> torch.dtype:
    """Data type of the low-rank part."""
    return inputs


def forward(product: Product, given: Inputs) -> tuple[Tensor, Kept]:
    """The product, and what its backward needs."""
    inputs, lora_A, lora_B, routing_weights = given
    dispatch, tokens, owned = product.dispatch, product.tokens, product.owned
    on_rows, kept = _operations(inputs), Kept(None, None)
    rows = inputs if tokens is None else on_rows.gather(inputs, dispatch)
    output = _multiply(rows, product.weight, dispatch, transposed=False)
    if product.bias is not None:
        output += product.bias.index_select(0, dispatch.experts)
    if owned is not None:
        keep = draw_kept(rows, product.dropout)
        x = (inputs, tokens) if keep is None else (rows * keep, None)
        low = on_rows.low_rows(*x, lora_A, owned, dispatch, product.scaling)
        on_rows.add_rows_(output, low, lora_B, owned, dispatch)
        kept = Kept(low, keep)
    if routing_weights is not None:
        output = on_rows.sum_pairs(output, routing_weights, dispatch)
    elif dispatch.sentinels:
        on_rows.clear_sentinels_(output, dispatch)
    return output, kept


def backward(
    product: Product, grad: Tensor, given: Inputs, kept: Kept, wanted: Sequence[bool]
) -> Gradients:
    """The gradients of what a product is differentiated in; ``wanted`` tells for each of them."""
    inputs, lora_A, lora_B, weights = given
    dispatch, tokens, owned = product.dispatch, product.tokens, product.owned
    on_rows = _operations(inputs)
    low: Any = kept.low
    d_rows: Any = None
    d_low: Any = None
    d_A = d_B = d_inputs = d_weights = None
    # g and what follows from it lack the routing weight until it is multiplied in
    grad = grad.to(inputs.dtype).contiguous()
    by_token = None if weights is None else dispatch.tokens
    g = grad if by_token is None else on_rows.gather(grad, dispatch)
    if wanted[0] or wanted[3]:
        d_rows = _multiply(g, product.weight, dispatch, transposed=True)
    if owned is not None:
        d_low = on_rows.low_rows(grad, by_token, lora_B, owned, dispatch, product.scaling)
        if d_rows is not None:
            _add_kept_(on_rows, d_rows, kept.keep, d_low, lora_A, owned, dispatch)
    if weights is not None:
        w = weights.reshape(-1)[dispatch.order]
        if d_rows is not None:
            d_w = on_rows.weigh_(d_rows, inputs, tokens, w, dispatch)
            d_weights = _with_bias(d_w, g, product.bias, dispatch)[dispatch.rows]
        if owned is not None:
            low, d_low = (each * w.unsqueeze(-1).to(each.dtype) for each in (low, d_low))
    if owned is not None:
        x = _read(inputs, tokens, kept.keep)
        d_A = on_rows.factor_gradient(d_low, *x, lora_A, owned, dispatch)
        d_B = on_rows.factor_gradient(low, grad, by_token, lora_B, owned, dispatch)
    if wanted[0]:
        d_inputs = _to_inputs(on_rows, d_rows, tokens, dispatch)
    return d_inputs, d_A, d_B, d_weights if wanted[3] else None


def _operations(inputs: Tensor) -> Any:
    """The module of operations on rows for a device."""
    if not runs_triton(inputs):
        return torch_rows
    from drlora_torch.lora.kernels import triton_rows

    return triton_rows


def _read(
    inputs: Tensor, tokens: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What A is multiplied with, and the token of each row where these are tokens."""
    if keep is None:
        return inputs, tokens
    return (inputs if tokens is None else inputs.index_select(0, tokens)) * keep, None


def _add_kept_(
    on_rows: Any,
    d_rows: Tensor,
    keep: Tensor | None,
    d_low: Tensor,
    lora_A: Tensor,
    owned: Owned,
    dispatch: Dispatch,
) -> None:
    """Add the gradient that reaches the rows through A."""
    if keep is None:
        on_rows.add_rows_(d_rows, d_low, lora_A, owned, dispatch)
        return
    through = torch.zeros_like(d_rows)
    on_rows.add_rows_(through, d_low, lora_A, owned, dispatch)
    d_rows += through * keep


def _with_bias(d_w: Tensor, g: Tensor, bias: Tensor | None, dispatch: Dispatch) -> Tensor:
    """The gradient y g = x d_x + bias g of the routing weights, [S]: y itself is not needed."""
    if bias is None:
        return d_w
    of_bias = (g * bias.index_select(0, dispatch.experts)).sum(dim=1).to(d_w.dtype)
    return d_w + of_bias.masked_fill(~dispatch.live, 0.0)


def _to_inputs(on_rows: Any, d_rows: Tensor, tokens: Tensor | None, dispatch: Dispatch) -> Tensor:
    if tokens is not None:
        summed: Tensor = on_rows.sum_pairs(d_rows, None, dispatch)
        return summed
    if dispatch.sentinels:
        on_rows.clear_sentinels_(d_rows, dispatch)
    return d_rows


def _multiply(rows: Tensor, weight: Stored, dispatch: Dispatch, *, transposed: bool) -> Tensor:
    """Rows times the weights, [S, I] -> [S, O], or times the transposed ones, [S, O] -> [S, I]."""
    if weight.packed:
        return _by_groups(rows, weight, dispatch, transposed=transposed)
    matrices = _chosen(weight, 0, weight.shape[0], rows, transposed)
    return grouped_mm(rows, matrices, offs=dispatch.offsets)


def _by_groups(rows: Tensor, weight: Stored, dispatch: Dispatch, *, transposed: bool) -> Tensor:
    """The same with packed weights, which are unpacked a group of experts at a time.

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
