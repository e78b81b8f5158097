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

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels.factors import Kernel, LoRAFactors
from drlora_torch.lora.stored import Stored


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
    if lora is None:
        empty = inputs.new_empty(0, 0)
        slots: list[slice | Tensor | None] = [None] * weight.shape[0]
        lora = LoRAFactors(empty, empty, slots, empty, 0.0, 0.0, Kernel.RAGGED)
    output: Tensor = _ExpertLinear.apply(  # type: ignore[no-untyped-call]
        inputs, lora.lora_A, lora.lora_B, routing_weights, weight, bias, lora, dispatch, gather
    )
    return output


class _ExpertLinear(torch.autograd.Function):
    """All experts of one projection; differentiable in inputs, A, B and routing weights."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        routing_weights: Tensor | None,
        weight: Stored,
        bias: Tensor | None,
        lora: LoRAFactors,
        dispatch: Dispatch,
        gather: bool,
    ) -> Tensor:
        dtype = inputs.dtype
        if routing_weights is not None:
            dtype = torch.result_type(inputs, routing_weights)
            routing_weights = dispatch.live_weights(routing_weights)
        output = dispatch.empty(inputs, weight.shape[2], dtype)
        xs, ys = _rows(inputs, dispatch, gather), dispatch.split(output)
        lows: list[Tensor | None] = []
        keeps: list[Tensor | None] = []
        with torch.autocast(inputs.device.type, enabled=False):
            for e in _visited(dispatch):
                x, y = xs(e), ys[e]
                if y.dtype == x.dtype:
                    torch.mm(x, weight.matrix(e, x.dtype), out=y)
                else:
                    y.copy_(x @ weight.matrix(e, x.dtype))
                if bias is not None:
                    y += bias[e]
                low = keep = None
                if (slots := lora.slots[e]) is not None:
                    keep = _draw_kept(x, lora.dropout)
                    low_dtype = torch.promote_types(x.dtype, lora_A.dtype)
                    low = _kept(x, keep).to(low_dtype) @ _of(lora_A, slots, low_dtype).T
                    _add_product(y, low.mul_(lora.scaling), _of(lora_B, slots, low_dtype))
                lows.append(low)
                keeps.append(keep)
        ctx.save_for_backward(
            inputs, lora_A, lora_B, routing_weights, bias, *weight.tensors, *lows, *keeps
        )
        ctx.weight, ctx.lora = dataclasses.replace(weight, tensors=()), lora
        ctx.num_tensors, ctx.dispatch, ctx.gather = len(weight.tensors), dispatch, gather
        if routing_weights is None:
            return output
        return dispatch.sum(output, routing_weights.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, lora_A, lora_B, routing_weights, bias, *kept = ctx.saved_tensors
        weight = dataclasses.replace(ctx.weight, tensors=tuple(kept[: ctx.num_tensors]))
        kept = kept[ctx.num_tensors :]
        lora, dispatch, gather = ctx.lora, ctx.dispatch, ctx.gather
        needs_inputs, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        needs_rows = needs_inputs or needs_weights
        d_rows = dispatch.empty(inputs, inputs.shape[1] if needs_rows else 0)
        d_A, d_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
        weighted = routing_weights is not None
        w = routing_weights.reshape(-1)[dispatch.order] if weighted else grad.new_empty(0)
        d_w = torch.zeros_like(w)
        ws, d_ws = (dispatch.split(t) for t in (w, d_w)) if weighted else ((), ())
        xs, d_xs = _rows(inputs, dispatch, gather), dispatch.split(d_rows)
        # g and what follows from it lack the routing weight until it is multiplied in
        gs = _rows(grad.to(inputs.dtype), dispatch, weighted)
        lows, keeps = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        experts = zip(_visited(dispatch), lows, keeps, strict=True)
        with torch.autocast(grad.device.type, enabled=False):
            for e, low, keep in experts:
                x, g, d_x, slots = xs(e), gs(e), d_xs[e], lora.slots[e]
                if needs_rows:
                    torch.mm(g, weight.matrix(e, g.dtype).T, out=d_x)
                if slots is not None:
                    g_low = g.to(low.dtype)
                    d_low = (g_low @ _of(lora_B, slots, low.dtype).T).mul_(lora.scaling)
                    if needs_rows:
                        _add_product(d_x, d_low, _of(lora_A, slots, low.dtype), keep)
                    d_low_w, low_w = d_low, low
                    if weighted:
                        d_low_w, low_w = _weighted(d_low, ws[e]), _weighted(low, ws[e])
                    d_A[slots] = (d_low_w.T @ _kept(x, keep).to(low.dtype)).to(d_A.dtype)
                    d_B[slots] = (low_w.T @ g_low).to(d_B.dtype)
                if needs_weights:  # y.g = x.d_x + bias.g, so y itself is not needed
                    d_ws[e].copy_((d_x.to(w.dtype) * x).sum(dim=1))
                    if bias is not None:
                        d_ws[e].add_(g @ bias[e].to(g.dtype))
        if weighted and needs_inputs:
            d_rows *= w.unsqueeze(-1)
        d_inputs = d_weights = None
        if needs_inputs:
            d_inputs = dispatch.sum(d_rows) if gather else d_rows
        if needs_weights:
            d_weights = d_w[dispatch.rows]
        return d_inputs, d_A, d_B, d_weights, None, None, None, None, None


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


def _draw_kept(x: Tensor, dropout: float) -> Tensor | None:
    """Dropout's factors: 0, or 1 / (1 - p) where an input is kept; None without dropout."""
    if dropout == 0.0:
        return None
    return torch.empty_like(x).bernoulli_(1.0 - dropout).div_(1.0 - dropout)


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
