"""Expert products with LoRA: one function, two kernels behind it.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import grouped, ragged
from drlora_torch.lora.kernels.factors import Kernel, LoRAFactors
from drlora_torch.lora.kernels.product import Inputs, Kept, Product, without_autocast
from drlora_torch.lora.stored import Stored

__all__ = ["Kernel", "LoRAFactors", "expert_linear"]


def expert_linear(
    inputs: Tensor,
    weight: Stored,
    bias: Tensor | None,
    lora: LoRAFactors | None,
    dispatch: Dispatch,
    *,
    gather: bool = False,
    routing_weights: Tensor | None = None,
) -> Tensor:
    """y_e = x_e W_e^T + bias_e + s (x_e A_e^T) B_e for the rows of every expert e.

    Args:
        inputs: sorted rows, [S, I]; with ``gather`` the tokens themselves, [T, I].
        weight: the frozen weights of the experts.
        bias: [N, O] or None.
        lora: the low-rank update and its kernel, or None for the base product alone.
        dispatch: which rows belong to which expert.
        gather: take each pair's row from its token.
        routing_weights: [T, K]; given, each token's rows are summed with these weights.

    Returns:
        Sorted rows [S, O] in the dtype of ``inputs``, sentinel rows 0 before the bias; with
        ``routing_weights`` [T, O] in the dtype that inputs and weights promote to.
    """
    kernel = choose(Kernel.AUTO if lora is None else lora.kernel, weight, inputs.dtype)
    if lora is None:
        product = Product(weight, bias, None, 0.0, 0.0, dispatch, gather)
        given = Inputs(inputs, None, None, routing_weights)
    else:
        product = Product(weight, bias, lora.owned, lora.scaling, lora.dropout, dispatch, gather)
        given = Inputs(inputs, lora.lora_A, lora.lora_B, routing_weights)
    code = code_of(kernel)
    output: Tensor = _ExpertLinear.apply(code, product, *given)  # type: ignore[no-untyped-call]
    return output


def code_of(kernel: Kernel) -> Any:
    """The module of a kernel: ``forward`` and ``backward`` of a product."""
    return grouped if kernel is Kernel.GROUPED else ragged


class _ExpertLinear(torch.autograd.Function):
    """A product by one of the kernels; differentiable once in what it is given."""

    @staticmethod
    def forward(ctx: Any, code: Any, product: Product, *given: Any) -> Tensor:
        with without_autocast(given[0].device):
            output, kept = code.forward(product, Inputs(*given))
        ctx.save_for_backward(*given, *kept, *product.tensors)
        ctx.code, ctx.product = code, product.given(())
        found: Tensor = output
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        given, kept, rest = Inputs(*tensors[:4]), Kept(*tensors[4:6]), tensors[6:]
        with without_autocast(grad.device):
            product = ctx.product.given(rest)
            found = ctx.code.backward(product, grad, given, kept, ctx.needs_input_grad[2:])
        return None, None, *found


def choose(wanted: Kernel, weight: Stored, dtype: torch.dtype) -> Kernel:
    """The kernel for a weight: the one asked for, or the faster one of those that take it.

    ``dtype`` is that of the inputs.
    """
    if wanted is not Kernel.AUTO:
        return wanted
    # the GPUs that grouped_mm has kernels for (Ampere on), as Transformers checks it too
    on_gpu = weight.device.type == "cuda"
    fast = on_gpu and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    fits = grouped.supports(weight.shape, weight.dtype or dtype)
    return Kernel.GROUPED if fast and fits else Kernel.RAGGED
