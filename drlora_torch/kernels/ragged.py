"""The kernel for CPUs: one loop over experts, the low-rank part ragged over active ranks.

The base product, the low-rank part, the gather of tokens before the first projection and the
weighted sum over experts after the last one happen expert by expert, on rows that are still in
cache. Kept for backward: the inputs, x A^T, and no copy of any weight.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features, P rank slots, n rows and r rank of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drlora_torch.dispatch import Dispatch
from drlora_torch.kernels.factors import Kernel, LoRAFactors


def expert_linear(
    inputs: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    lora: LoRAFactors | None,
    dispatch: Dispatch,
    gather: bool,
    routing_weights: Tensor | None,
) -> Tensor:
    """See :func:`drlora_torch.kernels.expert_linear`; ``matrices`` are [N, I, O]."""
    if lora is None:
        empty = inputs.new_empty(0, 0)
        slots: list[slice | Tensor | None] = [None] * matrices.shape[0]
        lora = LoRAFactors(empty, empty, slots, empty, 0.0, 0.0, Kernel.RAGGED)
    output: Tensor = _ExpertLinear.apply(  # type: ignore[no-untyped-call]
        inputs, lora.lora_A, lora.lora_B, routing_weights, matrices, bias, lora, dispatch, gather
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
        matrices: Tensor,
        bias: Tensor | None,
        lora: LoRAFactors,
        dispatch: Dispatch,
        gather: bool,
    ) -> Tensor:
        weights = None
        dtype = inputs.dtype
        if routing_weights is not None:
            weights = routing_weights.reshape(-1)[dispatch.order].unsqueeze(-1)  # [S, 1]
            dtype = torch.result_type(inputs, weights)
        output = dispatch.empty(inputs, matrices.shape[2], dtype)
        lows: list[Tensor | None] = []
        keeps: list[Tensor | None] = []
        with torch.autocast(inputs.device.type, enabled=False):
            for e, at in dispatch:
                x = inputs[dispatch.tokens[at]] if gather else inputs[at]
                y = output[at] if weights is None else x.new_empty(x.shape[0], output.shape[1])
                torch.mm(x, matrices[e].to(x.dtype), out=y)
                if bias is not None:
                    y += bias[e]
                low = keep = None
                if (slots := lora.slots[e]) is not None:
                    keep = _draw_kept(x, lora.dropout)
                    low = _kept(x, keep) @ lora_A[slots].to(x.dtype).T
                    y.addmm_(low, lora_B[slots].to(x.dtype), alpha=lora.scaling)
                lows.append(low)
                keeps.append(keep)
                if weights is not None:
                    output.index_copy_(0, dispatch.order[at], y * weights[at])
        ctx.save_for_backward(inputs, lora_A, lora_B, weights, matrices, bias, *lows, *keeps)
        ctx.lora, ctx.dispatch, ctx.gather = lora, dispatch, gather
        return output if weights is None else dispatch.sum_of_pairs(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, lora_A, lora_B, weights, matrices, bias, *kept = ctx.saved_tensors
        lora, dispatch, gather = ctx.lora, ctx.dispatch, ctx.gather
        needs_inputs, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        d_inputs = dispatch.empty(inputs, inputs.shape[1]) if needs_inputs else None
        d_weights = weights.new_zeros(dispatch.num_pairs) if needs_weights else None
        d_A, d_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
        lows, keeps = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        with torch.autocast(grad.device.type, enabled=False):
            for (e, at), low, keep in zip(dispatch, lows, keeps, strict=True):
                pairs, slots = dispatch.order[at], lora.slots[e]
                x = inputs[dispatch.tokens[at]] if gather else inputs[at]
                # g and what follows from it lack the routing weight until it is multiplied in
                g = grad[at] if weights is None else grad[dispatch.tokens[at]].to(x.dtype)
                d_low = None
                if slots is not None:
                    d_low = (g @ lora_B[slots].to(g.dtype).T).mul_(lora.scaling)
                if needs_inputs or needs_weights:
                    d_x = g @ matrices[e].to(g.dtype).T
                    if d_low is not None:
                        _add_low_rank(d_x, d_low, lora_A[slots].to(g.dtype), keep)
                    if d_weights is not None:  # y.g = x.d_x + bias.g, so y itself is not needed
                        d_w = (d_x.to(weights.dtype) * x).sum(dim=1)
                        d_w = d_w if bias is None else d_w + g @ bias[e].to(g.dtype)
                        d_weights[pairs] = d_w.to(weights.dtype)
                    if d_inputs is not None:
                        d_inputs[pairs if gather else at] = _weighted(d_x, weights, at)
                if d_low is not None:
                    d_low, low_s = _weighted(d_low, weights, at), low * lora.scaling
                    d_A[slots] = (d_low.T @ _kept(x, keep)).to(d_A.dtype)
                    d_B[slots] = (_weighted(low_s, weights, at).T @ g).to(d_B.dtype)
        if d_inputs is not None and gather:
            d_inputs = dispatch.sum_of_pairs(d_inputs)
        if d_weights is not None:
            d_weights = d_weights.view(-1, dispatch.top_k)
        return d_inputs, d_A, d_B, d_weights, None, None, None, None, None


def _weighted(rows: Tensor, weights: Tensor | None, at: slice) -> Tensor:
    """Rows of an expert times their routing weights, in the dtype of the rows."""
    return rows if weights is None else (rows * weights[at]).to(rows.dtype)


def _draw_kept(x: Tensor, dropout: float) -> Tensor | None:
    """Dropout's factors: 0, or 1 / (1 - p) where an input is kept; None without dropout."""
    if dropout == 0.0:
        return None
    return torch.empty_like(x).bernoulli_(1.0 - dropout).div_(1.0 - dropout)


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _add_low_rank(d_x: Tensor, d_low: Tensor, lora_A: Tensor, keep: Tensor | None) -> None:
    """Add the gradient that comes through x A^T to that of x."""
    if keep is None:
        d_x.addmm_(d_low, lora_A)
    else:
        d_x += (d_low @ lora_A) * keep
