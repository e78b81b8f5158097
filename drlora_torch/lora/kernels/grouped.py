"""The kernel for GPUs: grouped matrix products, no loop and no waiting for the device.

``torch.nn.functional.grouped_mm`` multiplies all experts' rows at once. Ranks are padded with
zeros to the largest, and that to a multiple of 8, since its operands need strides of 16 bytes.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features, R padded rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, grouped_mm

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels.factors import LoRAFactors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes


def supports(weight: Tensor) -> bool:
    """True if ``grouped_mm`` takes these weights [N, ., .]: their dtype, and rows of 16 bytes."""
    aligned = all(size * weight.element_size() % ALIGNMENT == 0 for size in weight.shape[1:])
    return weight.dtype in DTYPES and aligned


def expert_linear(
    inputs: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    lora: LoRAFactors | None,
    dispatch: Dispatch,
    gather: bool,
    routing_weights: Tensor | None,
) -> Tensor:
    """Compute :func:`drlora_torch.lora.kernels.expert_linear`; ``matrices`` are [N, I, O]."""
    dead = ~dispatch.live.unsqueeze(-1)
    # grouped_mm leaves the rows behind the last expert unwritten, forward and backward
    rows = (inputs[dispatch.tokens] if gather else inputs).masked_fill(dead, 0.0)
    output = grouped_mm(rows, matrices.to(rows.dtype), offs=dispatch.offsets)
    if lora is not None:
        output = output + lora.scaling * _low_rank(rows, lora, dispatch, dead)
    output = output.masked_fill(dead, 0.0)
    if bias is not None:
        output = output + bias[dispatch.experts].to(output.dtype)
    return output if routing_weights is None else dispatch.combine(output, routing_weights)


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
