"""The product of experts as an operator of torch: one node in a graph of ``torch.compile``.

The graph holds no slots and no ranks: the operator asks for the layer's, by its number, when it
runs. So growth changes data and nothing is compiled anew.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features, P rank slots, W = r_max, rounded up.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels.product import Inputs, Kept, Product, without_autocast

TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)
"""It draws dropout; and a replayed CUDA graph would go on with the slots of its capture."""
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Each :class:`drlora_torch.lora.layers.ExpertLoRA` by its number."""
_numbers = itertools.count()


def register(layer: Any) -> int:
    """Let the operators find a layer by its number, as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


class Call(NamedTuple):
    """What an operator takes beside tensors, as numbers."""

    layer: int
    gather: int
    width: int
    """W."""
    top_k: int
    sentinels: int


def expert_linear(
    layer: int, given: Inputs, bias: Tensor | None, dispatch: Dispatch, projection: str,
    *, gather: bool, dropout: float, width: int,
) -> Tensor:  # fmt: skip
    """Compute :func:`drlora_torch.lora.kernels.expert_linear` of a layer that is registered."""
    rows = [dispatch.order, dispatch.tokens, dispatch.experts, dispatch.offsets]
    call = Call(layer, int(gather), width, dispatch.top_k, int(dispatch.sentinels))
    output: Tensor = _forward(*given, bias, rows, projection, dropout, list(call))[0]
    return output


def _find(
    inputs: Tensor, bias: Tensor | None, rows: Sequence[Tensor], projection: str, dropout: float,
    call: Call,
) -> tuple[Any, Product]:  # fmt: skip
    """The kernel of a layer and its product, as the layer is now."""
    if (layer := _layers.get(call.layer)) is None:
        raise RuntimeError(
            "a compiled graph runs whose adapter is gone: the model was dropped, or its adapter "
            "detached, before the backward pass of its forward; keep both until that is over"
        )
    order, tokens, experts, offsets = rows
    dispatch = Dispatch(order, tokens, experts, offsets, call.top_k, bool(call.sentinels))
    product = layer.product(projection, bias, dropout, dispatch, bool(call.gather))
    return layer.code(projection, inputs.dtype), product


@torch.library.custom_op("drlora::expert_linear", mutates_args=(), tags=TAGS)
def _forward(
    inputs: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    routing_weights: Tensor | None,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    projection: str,
    dropout: float,
    numbers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*numbers)
    code, product = _find(inputs, bias, rows, projection, dropout, call)
    with without_autocast(inputs.device):
        output, kept = code.forward(product, Inputs(inputs, lora_A, lora_B, routing_weights))
    low = pad(kept.low, (0, call.width - kept.low.shape[1]))
    return output, low, inputs.new_empty(0) if kept.keep is None else kept.keep


@_forward.register_fake
def _(
    inputs: Tensor, lora_A: Tensor, lora_B: Tensor, routing_weights: Tensor | None, bias: Any,
    rows: Sequence[Tensor], projection: str, dropout: float, numbers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call, pairs, features = Call(*numbers), rows[0].shape[0], lora_B.shape[1]
    code = _layers[call.layer].code(projection, inputs.dtype)
    low = inputs.new_empty(pairs, call.width, dtype=code.low_dtype(inputs.dtype, lora_A.dtype))
    keep = inputs.new_empty((pairs, inputs.shape[1]) if dropout else (0,))
    if routing_weights is None:
        return inputs.new_empty(pairs, features), low, keep
    dtype = torch.result_type(inputs, routing_weights)
    return inputs.new_empty(routing_weights.shape[0], features, dtype=dtype), low, keep


@torch.library.custom_op("drlora::expert_linear_backward", mutates_args=(), tags=TAGS)
def _backward(
    grad: Tensor,
    inputs: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    routing_weights: Tensor | None,
    low: Tensor,
    keep: Tensor,
    wanted: Sequence[bool],
    bias: Tensor | None,
    rows: Sequence[Tensor],
    projection: str,
    dropout: float,
    numbers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code, product = _find(inputs, bias, rows, projection, dropout, Call(*numbers))
    used = 0 if product.owned is None else product.owned.width
    kept = Kept(low[:, :used].contiguous(), keep if dropout else None)
    given = Inputs(inputs, lora_A, lora_B, routing_weights)
    with without_autocast(grad.device):
        d_inputs, d_A, d_B, d_w = code.backward(product, grad, given, kept, wanted)
    d_inputs, d_w = (grad.new_empty(0) if each is None else each for each in (d_inputs, d_w))
    return d_inputs, d_A, d_B, d_w


@_backward.register_fake
def _(
    grad: Tensor, inputs: Tensor, lora_A: Tensor, lora_B: Tensor, routing_weights: Tensor | None,
    low: Tensor, keep: Tensor, wanted: Sequence[bool], *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_inputs = torch.empty_like(inputs) if wanted[0] else grad.new_empty(0)
    d_w = grad.new_empty(0)
    if wanted[3] and routing_weights is not None:
        d_w = torch.empty_like(routing_weights)
    return d_inputs, torch.empty_like(lora_A), torch.empty_like(lora_B), d_w


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, bias, rows, projection, dropout, numbers = inputs
    ctx.save_for_backward(*given, *output[1:], bias, *rows)
    ctx.rest = projection, dropout, numbers


def _differentiate(ctx: Any, grad: Tensor, *of_kept: Any) -> tuple[Any, ...]:
    tensors, wanted = ctx.saved_tensors, list(ctx.needs_input_grad[:4])
    found = _backward(grad, *tensors[:6], wanted, tensors[6], list(tensors[7:]), *ctx.rest)
    gradients = [each if needs else None for each, needs in zip(found, wanted, strict=True)]
    return (*gradients, None, [None] * len(tensors[7:]), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
