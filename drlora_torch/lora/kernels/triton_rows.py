"""The functions of :mod:`drlora_torch.lora.kernels.torch_rows` as Triton kernels.

Each reads and writes every row once. Factors are read where they are stored, slot by slot, and each
expert costs what its own rank does; products are accumulated in float32.

A program has a block of sorted rows, which may be those of several experts: it goes through them.
Programs that follow each other have neighboring columns of the same rows.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
F features, P rank slots, R rank dimensions of an expert at most.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels.factors import Owned

ROWS = 64  # of a block
FEATURES = 128  # of a block


@triton.jit
def _low_rows(
    inputs, tokens, factor, table, ranks, experts, offsets, low, scaling,
    features, num_experts, width: tl.constexpr, gather: tl.constexpr,
    block: tl.constexpr, columns: tl.constexpr, dims: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * block
    rows = begin + tl.arange(0, block)
    end = tl.load(offsets + num_experts - 1)
    if begin < end:
        owner = tl.load(experts + rows, mask=rows < end, other=-1).to(tl.int32)
        source = tl.load(tokens + rows, mask=rows < end, other=0) if gather else rows.to(tl.int64)
        first = tl.load(experts + begin).to(tl.int32)
        last = tl.load(experts + tl.minimum(begin + block, end) - 1).to(tl.int32)
        for expert in range(first, last + 1):
            mine = owner == expert
            rank = tl.load(ranks + expert).to(tl.int32)
            for start in range(0, rank, dims):
                dim = start + tl.arange(0, dims)
                slot = tl.load(table + expert * width + dim, mask=dim < rank, other=0)
                total = tl.zeros((block, dims), dtype=tl.float32)
                for at in range(0, features, columns):
                    feature = at + tl.arange(0, columns)
                    inside = feature < features
                    x = tl.load(
                        inputs + source[:, None] * features + feature[None, :],
                        mask=mine[:, None] & inside[None, :], other=0.0,
                    )  # fmt: skip
                    f = tl.load(
                        factor + slot[None, :] * features + feature[:, None],
                        mask=(dim < rank)[None, :] & inside[:, None], other=0.0,
                    )  # fmt: skip
                    total = tl.dot(x, f.to(x.dtype), total, input_precision=precision)
                place = low + rows.to(tl.int64)[:, None] * width + dim[None, :]
                kept = mine[:, None] & (dim < width)[None, :]
                tl.store(place, (total * scaling).to(low.dtype.element_ty), mask=kept)


@triton.jit
def _add_rows(
    output, low, factor, table, ranks, experts, offsets,
    features, num_experts, width: tl.constexpr,
    block: tl.constexpr, columns: tl.constexpr, dims: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(1) * block
    rows = begin + tl.arange(0, block)
    feature = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = feature < features
    end = tl.load(offsets + num_experts - 1)
    if begin < end:
        owner = tl.load(experts + rows, mask=rows < end, other=-1).to(tl.int32)
        first = tl.load(experts + begin).to(tl.int32)
        last = tl.load(experts + tl.minimum(begin + block, end) - 1).to(tl.int32)
        place = output + rows.to(tl.int64)[:, None] * features + feature[None, :]
        kept = (rows < end)[:, None] & inside[None, :]
        total = tl.load(place, mask=kept, other=0.0).to(tl.float32)
        for expert in range(first, last + 1):
            mine = owner == expert
            rank = tl.load(ranks + expert).to(tl.int32)
            for start in range(0, rank, dims):
                dim = start + tl.arange(0, dims)
                slot = tl.load(table + expert * width + dim, mask=dim < rank, other=0)
                x = tl.load(
                    low + rows.to(tl.int64)[:, None] * width + dim[None, :],
                    mask=mine[:, None] & (dim < rank)[None, :], other=0.0,
                )  # fmt: skip
                f = tl.load(
                    factor + slot[:, None] * features + feature[None, :],
                    mask=(dim < rank)[:, None] & inside[None, :], other=0.0,
                )  # fmt: skip
                total = tl.dot(x, f.to(x.dtype), total, input_precision=precision)
        tl.store(place, total.to(output.dtype.element_ty), mask=kept)


@triton.jit
def _factor_gradient(
    low, inputs, tokens, gradient, table, ranks, offsets,
    features, width: tl.constexpr, gather: tl.constexpr,
    block: tl.constexpr, columns: tl.constexpr, dims: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    feature = tl.program_id(0) * columns + tl.arange(0, columns)
    inside = feature < features
    rank = tl.load(ranks + expert).to(tl.int32)
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    for start in range(0, rank, dims):
        dim = start + tl.arange(0, dims)
        slot = tl.load(table + expert * width + dim, mask=dim < rank, other=0)
        total = tl.zeros((dims, columns), dtype=tl.float32)
        for at in range(begin, end, block):
            rows = at + tl.arange(0, block)
            mine = rows < end
            source = tl.load(tokens + rows, mask=mine, other=0) if gather else rows.to(tl.int64)
            x = tl.load(
                low + rows.to(tl.int64)[None, :] * width + dim[:, None],
                mask=mine[None, :] & (dim < rank)[:, None], other=0.0,
            )  # fmt: skip
            y = tl.load(
                inputs + source[:, None] * features + feature[None, :],
                mask=mine[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(x, y.to(x.dtype), total, input_precision=precision)
        place = gradient + slot[:, None] * features + feature[None, :]
        kept = (dim < rank)[:, None] & inside[None, :]
        tl.store(place, total.to(gradient.dtype.element_ty), mask=kept)


@triton.jit
def _gather(
    inputs, tokens, output, offsets, features, num_experts, columns: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offsets + num_experts - 1):
        token = tl.load(tokens + row)
        for at in range(0, features, columns):
            feature = at + tl.arange(0, columns)
            inside = feature < features
            value = tl.load(inputs + token * features + feature, mask=inside)
            tl.store(output + row * features + feature, value, mask=inside)


@triton.jit
def _sum_pairs(
    rows, places, weights, offsets, output,
    features, num_experts,
    top_k: tl.constexpr, weighted: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = feature < features
    end = tl.load(offsets + num_experts - 1)
    total = tl.zeros((columns,), dtype=tl.float32)
    for k in range(top_k):
        place = tl.load(places + token * top_k + k)
        value = tl.load(rows + place * features + feature, mask=inside & (place < end), other=0.0)
        value = value.to(tl.float32)
        if weighted:
            weight = tl.load(weights + token * top_k + k).to(tl.float32)
            value = tl.where(place < end, value * weight, 0.0)
        total += value
    tl.store(output + token * features + feature, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _weigh(
    gradient, inputs, tokens, weights, products, offsets,
    features, num_experts, gather: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    product = tl.zeros((), dtype=tl.float32)
    if row < tl.load(offsets + num_experts - 1):
        source = tl.load(tokens + row) if gather else row
        weight = tl.load(weights + row).to(tl.float32)
        total = tl.zeros((columns,), dtype=tl.float32)
        for at in range(0, features, columns):
            feature = at + tl.arange(0, columns)
            inside = feature < features
            place = gradient + row * features + feature
            g = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(inputs + source * features + feature, mask=inside, other=0.0)
            total += g * x.to(tl.float32)
            tl.store(place, (g * weight).to(gradient.dtype.element_ty), mask=inside)
        product = tl.sum(total)
    tl.store(products + row, product.to(products.dtype.element_ty))


@triton.jit
def _clear_sentinels(
    rows, offsets, features, num_experts, columns: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * columns + tl.arange(0, columns)
    dead = row >= tl.load(offsets + num_experts - 1)
    nothing = tl.zeros((columns,), dtype=rows.dtype.element_ty)
    tl.store(rows + row * features + feature, nothing, mask=dead & (feature < features))


def gather(inputs: Tensor, dispatch: Dispatch) -> Tensor:
    features, inputs = inputs.shape[1], inputs.contiguous()
    output = inputs.new_empty(dispatch.num_pairs, features)
    _gather[(dispatch.num_pairs,)](
        inputs, dispatch.tokens, output, dispatch.offsets, features=features,
        num_experts=len(dispatch.offsets), columns=min(1024, triton.next_power_of_2(features)),
    )  # fmt: skip
    return output


def low_rows(
    inputs: Tensor,
    tokens: Tensor | None,
    factor: Tensor,
    owned: Owned,
    dispatch: Dispatch,
    scaling: float,
) -> Tensor:
    width = owned.table.shape[1]
    low = inputs.new_empty(dispatch.num_pairs, width)
    _low_rows[(_blocks(dispatch, ROWS),)](
        inputs.contiguous(), _or(tokens, inputs), factor, owned.table, owned.ranks,
        dispatch.experts, dispatch.offsets, low, scaling,
        features=factor.shape[1], width=width, num_experts=len(owned.ranks),
        gather=tokens is not None, block=ROWS, columns=FEATURES, dims=_dims(width),
        precision=_precision(inputs),
    )  # fmt: skip
    return low


def add_rows_(
    output: Tensor, low: Tensor, factor: Tensor, owned: Owned, dispatch: Dispatch
) -> None:
    features, width = factor.shape[1], owned.table.shape[1]
    _add_rows[triton.cdiv(features, FEATURES), _blocks(dispatch, ROWS)](
        output, low, factor, owned.table, owned.ranks, dispatch.experts, dispatch.offsets,
        features=features, width=width, num_experts=len(owned.ranks), block=ROWS,
        columns=FEATURES, dims=16, precision=_precision(low), num_stages=1,
    )  # fmt: skip


def factor_gradient(
    low: Tensor,
    inputs: Tensor,
    tokens: Tensor | None,
    factor: Tensor,
    owned: Owned,
    dispatch: Dispatch,
) -> Tensor:
    features, width = factor.shape[1], owned.table.shape[1]
    gradient = torch.zeros_like(factor)
    _factor_gradient[triton.cdiv(features, FEATURES), len(owned.ranks)](
        low, inputs.contiguous(), _or(tokens, inputs), gradient, owned.table, owned.ranks,
        dispatch.offsets, features=features, width=width, gather=tokens is not None, block=ROWS,
        columns=FEATURES, dims=_dims(width), precision=_precision(low),
    )  # fmt: skip
    return gradient


def sum_pairs(rows: Tensor, weights: Tensor | None, dispatch: Dispatch) -> Tensor:
    places, features = dispatch.rows, rows.shape[1]
    dtype = rows.dtype if weights is None else torch.result_type(rows, weights)
    output = rows.new_empty(len(places), features, dtype=dtype)
    columns = min(1024, triton.next_power_of_2(features))
    _sum_pairs[len(places), triton.cdiv(features, columns)](
        rows, places, rows if weights is None else weights.contiguous(), dispatch.offsets, output,
        features=features, num_experts=len(dispatch.offsets), top_k=dispatch.top_k,
        weighted=weights is not None, columns=columns,
    )  # fmt: skip
    return output


def weigh_(
    gradient: Tensor, inputs: Tensor, tokens: Tensor | None, weights: Tensor, dispatch: Dispatch
) -> Tensor:
    products, features = torch.empty_like(weights), gradient.shape[1]
    _weigh[(dispatch.num_pairs,)](
        gradient, inputs.contiguous(), _or(tokens, inputs), weights, products, dispatch.offsets,
        features=features, num_experts=len(dispatch.offsets), gather=tokens is not None,
        columns=min(1024, triton.next_power_of_2(features)),
    )  # fmt: skip
    return products


def clear_sentinels_(rows: Tensor, dispatch: Dispatch) -> None:
    features = rows.shape[1]
    columns = min(1024, triton.next_power_of_2(features))
    _clear_sentinels[dispatch.num_pairs, triton.cdiv(features, columns)](
        rows, dispatch.offsets, features=features, num_experts=len(dispatch.offsets),
        columns=columns,
    )  # fmt: skip


def _blocks(dispatch: Dispatch, size: int) -> int:
    return max(1, triton.cdiv(dispatch.num_pairs, size))


def _or(tokens: Tensor | None, inputs: Tensor) -> Tensor:
    """A pointer that a kernel which gathers nothing leaves alone."""
    return inputs if tokens is None else tokens


def _dims(width: int) -> int:
    """Rank dimensions of a block: most experts need one."""
    return 16 if width <= 16 else 32


def _precision(values: Tensor) -> Any:
    """How float32 is multiplied; as torch is told to."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
