"""Tie a tensor to the LoRA of a layer whose product does not use it.

Where an expert has no rank dimension nothing is multiplied with A and B. A layer of such experts
would not be part of autograd's graph: nobody would learn that backward reached it, and a loss
without any rank could not be differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tie(values: Tensor, lora: list[torch.nn.Parameter]) -> Tensor:
    """Return the values [...], which now depend on the parameters, with a gradient of 0.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> tie(torch.ones(3), [parameter]).sum().backward()
        >>> parameter.grad
        tensor([0., 0.])
    """
    tied: Tensor = _Tie.apply(values, *lora)  # type: ignore[no-untyped-call]
    return tied


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, *lora: Tensor) -> Tensor:
        ctx.save_for_backward(*lora)
        return values.detach()  # a view could not be changed in place, as some blocks do

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return grad, *(torch.zeros_like(each) if needs else None for each, needs in needed)
