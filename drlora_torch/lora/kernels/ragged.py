"""The kernel for CPUs: one loop over experts, the low-rank part ragged over active ranks.

An expert's tokens are gathered, multiplied and corrected while they are in cache; the weighted sum
over experts is one pass at the end. Kept for backward: the inputs, x A^T, and no copy of a weight;
a packed weight is unpacked one expert at a time, in forward and again in backward.

The low-rank part is computed in the dtype of A and B, so in float32 under bfloat16 weights: more
exact, and faster where shapes change. oneDNN, which multiplies bfloat16, compiles each shape that
is not in its cache, which takes 0.4 ms; token counts and ranks make hundreds of new shapes a step.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features, P rank slots, n rows and r rank of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels.product import Gradients, Inputs, Kept, Product


def low_dtype(inputs: torch.dtype, factor: torch.dtype) -> torch.dtype:
    """Data type of the low-rank part."""
    return torch.promote_types(inputs, factor)


def forward(product: Product, given: Inputs) -> tuple[Tensor, Kept]:
    """The product, and what its backward needs."""
    inputs, weight, dispatch = given.inputs, product.weight, product.dispatch
    dtype, routing_weights = inputs.dtype, given.routing_weights
    if routing_weights is not None:
        dtype = torch.result_type(inputs, routing_weights)
        routing_weights = dispatch.live_weights(routing_weights)
    output = dispatch.empty(inputs, weight.shape[2], dtype)
    xs, ys = _rows(inputs, dispatch, product.gather), dispatch.split(output)
    kept, slots = _make_room(product, given), _slots(product)
    lows, keeps = _split(kept.low, dispatch), _split(kept.keep, dispatch)
    for e in _visited(dispatch):
        x, y = xs(e), ys[e]
        if y.dtype == x.dtype:
            torch.mm(x, weight.matrix(e, x.dtype), out=y)
        else:
            y.copy_(x @ weight.matrix(e, x.dtype))
        if product.bias is not None:
            y += product.bias[e]
        if (owned := slots[e]) is not None:
            if (keep := keeps[e]) is not None:
                keep.bernoulli_(1.0 - product.dropout).div_(1.0 - product.dropout)
            A, B = (_of(each, owned, lows[e].dtype) for each in (given.lora_A, given.lora_B))
            low = (_kept(x, keep).to(A.dtype) @ A.T).mul_(product.scaling)
            lows[e][:, : len(A)] = low
            _add_product(y, low, B)
    if routing_weights is not None:
        output = dispatch.sum(output, routing_weights.to(dtype))
    return output, kept


def backward(
    product: Product, grad: Tensor, given: Inputs, kept: Kept, wanted: Sequence[bool]
) -> Gradients:
    """The gradients of what a product is differentiated in; ``wanted`` tells for each of them."""
    inputs, lora_A, lora_B, routing_weights = given
    weight, bias, dispatch = product.weight, product.bias, product.dispatch
    if routing_weights is not None:
        routing_weights = dispatch.live_weights(routing_weights)
    needs_inputs, needs_weights = wanted[0], wanted[3]
    needs_rows, weighted = needs_inputs or needs_weights, routing_weights is not None
    d_rows = dispatch.empty(inputs, inputs.shape[1] if needs_rows else 0)
    d_A: Any = None if lora_A is None else torch.zeros_like(lora_A)
    d_B: Any = None if lora_B is None else torch.zeros_like(lora_B)
    w = (
        grad.new_empty(0)
        if routing_weights is None
        else routing_weights.reshape(-1)[dispatch.order]
    )
    d_w = torch.zeros_like(w)
    ws, d_ws = (dispatch.split(t) for t in (w, d_w)) if weighted else ((), ())
    xs, d_xs = _rows(inputs, dispatch, product.gather), dispatch.split(d_rows)
    # g and what follows from it lack the routing weight until it is multiplied in
    gs = _rows(grad.to(inputs.dtype), dispatch, weighted)
    lows, keeps = _split(kept.low, dispatch), _split(kept.keep, dispatch)
    slots = _slots(product)
    for e in _visited(dispatch):
        x, g, d_x, owned, keep = xs(e), gs(e), d_xs[e], slots[e], keeps[e]
        if needs_rows:
            torch.mm(g, weight.matrix(e, g.dtype).T, out=d_x)
        if owned is not None:
            A, B = (_of(each, owned, lows[e].dtype) for each in (lora_A, lora_B))
            low, g_low = lows[e][:, : len(A)], g.to(A.dtype)
            d_low = (g_low @ B.T).mul_(product.scaling)
            if needs_rows:
                _add_product(d_x, d_low, A, keep)
            if weighted:
                d_low, low = _weighted(d_low, ws[e]), _weighted(low, ws[e])
            d_A[owned] = (d_low.T @ _kept(x, keep).to(A.dtype)).to(d_A.dtype)
            d_B[owned] = (low.T @ g_low).to(d_B.dtype)
        if needs_weights:  # y.g = x.d_x + bias.g, so y itself is not needed
            d_ws[e].copy_((d_x.to(w.dtype) * x).sum(dim=1))
            if bias is not None:
                d_ws[e].add_(g @ bias[e].to(g.dtype))
    if weighted and needs_inputs:
        d_rows *= w.unsqueeze(-1)
    d_inputs = (dispatch.sum(d_rows) if product.gather else d_rows) if needs_inputs else None
    return d_inputs, d_A, d_B, d_w[dispatch.rows] if needs_weights else None


def _make_room(product: Product, given: Inputs) -> Kept:
    """Room for what is kept of all experts."""
    if product.owned is None:
        return Kept(None, None)
    pairs, dtype = product.dispatch.num_pairs, low_dtype(given.inputs.dtype, given.lora_A.dtype)
    low = given.inputs.new_empty(pairs, product.owned.width, dtype=dtype)
    if product.dropout == 0.0:
        return Kept(low, None)
    return Kept(low, given.inputs.new_empty(pairs, given.inputs.shape[1]))


def _slots(product: Product) -> Sequence[Any]:
    count = product.weight.shape[0]
    return [None] * count if product.owned is None else product.owned.slots


def _split(rows: Tensor | None, dispatch: Dispatch) -> Sequence[Any]:
    """Views of the rows of each expert, or nothing for each."""
    return [None] * len(dispatch.counts) if rows is None else dispatch.split(rows)


def _visited(dispatch: Dispatch) -> Iterator[int]:
    """Each expert that has rows."""
    return (e for e, rows in enumerate(dispatch.counts[:-1]) if rows)


def _rows(source: Tensor, dispatch: Dispatch, gather: bool) -> Callable[[int], Tensor]:
    """Return a function from expert to its rows: a slice of sorted rows, or a gather."""
    if not gather:
        return dispatch.split(source).__getitem__
    tokens = dispatch.split(dispatch.tokens)
    return lambda e: source.index_select(0, tokens[e])  # source[tokens[e]] takes six times as long


def _of(storage: Tensor, slots: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of A or B that an expert owns."""
    rows = storage[slots] if isinstance(slots, slice) else storage.index_select(0, slots)
    return rows.to(dtype)


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows of an expert times their routing weights, in the dtype of the rows."""
    return (rows * weights.unsqueeze(-1)).to(rows.dtype)


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _add_product(y: Tensor, low: Tensor, factor: Tensor, keep: Tensor | None = None) -> None:
    """y += low factor, rounded once; times the factors of dropout where there are any."""
    if keep is not None:
        y += (low @ factor) * keep
    elif y.dtype == low.dtype:
        y.addmm_(low, factor)
    else:
        y.copy_(y.to(low.dtype).addmm_(low, factor))
