"""Counting in a graph of ``torch.compile``: an operator that passes the experts' output through.

Its backward is the moment at which the forward counts. The tracker is found by its number, when the
graph runs.

Shape letters: T tokens, K experts per token.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.step.forwards import ModelCall
from drlora_torch.step.routing import Routing

UNKNOWN = -1
NOT_COUNTED = -1
"""Ticket of a forward that does not count, or has been counted; others are numbers of forwards."""
TAGS = (torch.Tag.cudagraph_unsafe,)
"""A replayed CUDA graph would count nothing."""

_trackers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Each :class:`drlora_torch.step.tracker.StepTracker` by its number."""
_numbers = itertools.count()


def register(tracker: Any) -> int:
    """Let the operators find a tracker by its number, as long as it lives."""
    number = next(_numbers)
    _trackers[number] = tracker
    return number


def count(
    tracker: int,
    lora: ExpertLoRA,
    output: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    call: ModelCall | None,
) -> Tensor:
    """Return ``output`` [T, ...]; once a backward pass reaches it, the forward counts."""
    if not torch.is_grad_enabled():
        return output
    if call is None:
        call = ModelCall(None)
    length = UNKNOWN if call.length is None else call.length
    found: Tensor
    found, _ = _count(
        output, top_k_index, top_k_weights.detach(), call.mask, call.kinds, length,
        tracker, lora.name,
    )  # fmt: skip
    return found


@torch.library.custom_op("drlora::count", mutates_args=(), tags=TAGS)
def _count(
    output: Tensor,
    index: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    kinds: Tensor | None,
    length: int,
    tracker: int,
    layer: str,
) -> tuple[Tensor, Tensor]:
    alive = _trackers.get(tracker)
    return output.clone(), torch.tensor(NOT_COUNTED if alive is None else alive.began(layer))


@_count.register_fake
def _(output: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("drlora::reached", mutates_args=(), tags=TAGS)
def _reached(
    grad: Tensor,
    ticket: Tensor,
    index: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    kinds: Tensor | None,
    length: int,
    tracker: int,
    layer: str,
) -> Tensor:
    number = int(ticket)
    if (alive := _trackers.get(tracker)) is not None and number >= 0:
        call = ModelCall(mask, None if length == UNKNOWN else length, kinds)
        alive.reached(Routing(layer, number, index, weights, call))
    ticket.data.fill_(NOT_COUNTED)  # a graph that is gone through twice counts once
    return grad.clone()


@_reached.register_fake
def _(grad: Tensor, *rest: Any, **named: Any) -> Tensor:
    return torch.empty_like(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[1:5])
    ctx.numbers = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor, *of_ticket: Any) -> tuple[Any, ...]:
    return (_reached(grad, *ctx.saved_tensors, *ctx.numbers), *([None] * 7))


_count.register_autograd(_differentiate, setup_context=_save)
