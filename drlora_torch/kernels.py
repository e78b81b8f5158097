"""Expert products with LoRA: rows sorted by expert, the low-rank part ragged over active ranks.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features, R active rank dimensions of all experts together.
Ends: ``ends[e]`` is where expert e's rows (or rank dimensions) stop and those of e + 1 begin.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclasses.dataclass(frozen=True, slots=True)
class Dispatch:
    """The (token, expert) pairs of one forward, sorted by expert.

    Pairs whose index is not an expert (the sentinel ``num_experts`` of expert parallelism) come
    last and belong to nobody: ``ends[-1]`` is where they begin.
    """

    order: Tensor  # int64 [S], pair at each sorted row
    tokens: Tensor  # int64 [S], token at each sorted row
    experts: Tensor  # int64 [S], expert at each sorted row, clamped to N - 1 for sentinels
    ends: list[int]  # [N]

    @classmethod
    def sort(cls, top_k_index: Tensor, num_experts: int) -> Dispatch:
        """Sort the pairs of ``top_k_index`` (int64 [T, K]); stable, so results are repeatable."""
        pairs = top_k_index.reshape(-1)
        experts, order = torch.sort(pairs, stable=True)
        counts = torch.bincount(experts.clamp(max=num_experts), minlength=num_experts + 1)
        ends = counts[:num_experts].cumsum(0).tolist()
        clamped = experts.clamp(max=num_experts - 1)
        return cls(order, order // top_k_index.shape[-1], clamped, ends)

    def gather(self, hidden_states: Tensor) -> Tensor:
        """Rows of the tokens in sorted order, [T, I] -> [S, I]."""
        return hidden_states[self.tokens]

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sum the rows of each token times its routing weights, [S, O], [T, K] -> [T, O]."""
        num_tokens, top_k = weights.shape
        valid = self.ends[-1] if self.ends else 0
        weighted = rows * weights.reshape(-1)[self.order].unsqueeze(-1)
        if valid < rows.shape[0]:  # sentinel rows must reach neither the output nor the router
            dead = torch.arange(rows.shape[0], device=rows.device) >= valid
            weighted = weighted.masked_fill(dead.unsqueeze(-1), 0.0)
        unsorted = weighted.new_empty(weighted.shape).index_copy(0, self.order, weighted)
        return unsorted.view(num_tokens, top_k, rows.shape[1]).sum(dim=1)


@dataclasses.dataclass(frozen=True, slots=True)
class LoRAFactors:
    """Active rows of a projection's LoRA, ordered by expert, then rank dimension."""

    lora_A: Tensor  # [R, I]
    lora_B: Tensor  # [R, O]
    ends: list[int]  # [N]
    scaling: float


def expert_linear(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRAFactors | None,
    dispatch: Dispatch,
    *,
    transposed: bool,
    lora_rows: Tensor | None = None,
) -> Tensor:
    """y_e = x_e W_e^T + bias_e + s (x_e A_e^T) B_e for the rows of every expert e.

    Args:
        rows: sorted inputs, [S, I].
        weight: frozen weights, [N, O, I], or [N, I, O] if ``transposed``.
        bias: [N, O] or None.
        lora: the low-rank update, or None for the base product alone.
        dispatch: which rows belong to which expert.
        transposed: the axes of ``weight``, as the model declares them.
        lora_rows: what the low-rank part reads instead of ``rows`` (dropout), [S, I].

    Returns:
        [S, O], 0 in sentinel rows (before the bias), in the dtype of ``rows``.
    """
    matrices = weight if transposed else weight.transpose(1, 2)  # [N, I, O]
    if lora is None:
        lora = LoRAFactors(
            rows.new_empty(0, matrices.shape[1]),
            rows.new_empty(0, matrices.shape[2]),
            [0] * len(dispatch.ends),
            0.0,
        )
    output: Tensor = _ExpertLinear.apply(  # type: ignore[no-untyped-call]
        rows,
        lora_rows,
        matrices,
        lora.lora_A,
        lora.lora_B,
        dispatch.ends,
        lora.ends,
        lora.scaling,
    )
    return output if bias is None else output + bias[dispatch.experts].to(output.dtype)


class _ExpertLinear(torch.autograd.Function):
    """Base and low-rank product of all experts; keeps the inputs and x A^T, copies no weight."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        lora_rows: Tensor | None,
        matrices: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        row_ends: list[int],
        rank_ends: list[int],
        scaling: float,
    ) -> Tensor:
        output = rows.new_empty(rows.shape[0], matrices.shape[2])
        output[row_ends[-1] :] = 0
        projected = []
        read = rows if lora_rows is None else lora_rows
        with torch.autocast(rows.device.type, enabled=False):
            for e, at, dims in _segments(row_ends, rank_ends):
                out = output[at]
                torch.mm(rows[at], matrices[e].to(rows.dtype), out=out)
                if dims.start < dims.stop:
                    low = read[at] @ lora_A[dims].T
                    out.addmm_(low, lora_B[dims], alpha=scaling)
                    projected.append(low.reshape(-1))
        low_flat = torch.cat(projected) if projected else rows.new_empty(0)
        ctx.save_for_backward(read, matrices, lora_A, lora_B, low_flat)
        ctx.ends, ctx.scaling = (row_ends, rank_ends), scaling
        ctx.has_own_input = lora_rows is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, matrices, lora_A, lora_B, low_flat = ctx.saved_tensors
        grad_rows = torch.zeros_like(read) if ctx.needs_input_grad[0] else None
        grad_lora_rows = torch.zeros_like(read) if ctx.needs_input_grad[1] else None
        # Without dropout the low-rank part reads the rows themselves.
        low_target = grad_lora_rows if ctx.has_own_input else grad_rows
        grad_A, grad_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
        start = 0
        with torch.autocast(grad.device.type, enabled=False):
            for e, at, dims in _segments(*ctx.ends):
                g = grad[at]
                if grad_rows is not None:
                    torch.mm(g, matrices[e].to(g.dtype).T, out=grad_rows[at])
                if dims.start == dims.stop:
                    continue
                size = (at.stop - at.start) * (dims.stop - dims.start)
                low = low_flat[start : start + size].view(at.stop - at.start, -1)
                start += size
                grad_low = ctx.scaling * (g @ lora_B[dims].T)
                torch.mm(grad_low.T, read[at], out=grad_A[dims])
                torch.mm(ctx.scaling * low.T, g, out=grad_B[dims])
                if low_target is not None:
                    low_target[at].addmm_(grad_low, lora_A[dims])
        return grad_rows, grad_lora_rows, None, grad_A, grad_B, None, None, None


def _segments(row_ends: list[int], rank_ends: list[int]) -> list[tuple[int, slice, slice]]:
    """(expert, its rows, its rank dimensions) for every expert that has rows."""
    rows = itertools.pairwise([0, *row_ends])
    dims = itertools.pairwise([0, *rank_ends])
    return [
        (expert, slice(*at), slice(*dim))
        for expert, (at, dim) in enumerate(zip(rows, dims, strict=True))
        if at[0] < at[1]
    ]
