"""Routers that learn only after the warmup (``router="after_warmup"``).

They require gradients from the start: a Trainer gives its optimizer, and DistributedDataParallel
its buckets, only what does when they are made. Until the warmup is over their gradients are
dropped as they arrive, so that neither clipping nor an optimizer sees them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from drlora_torch.attached import Attached
from drlora_torch.options import RouterMode
from drlora_torch.step import hooks
from drlora_torch.step.parameters import router_parameters


def hold_routers(attached: Attached) -> Callable[[], None]:
    """Keep the routers of an active adapter where they are during the warmup; return the undo."""
    if attached.options.router is not RouterMode.AFTER_WARMUP or not attached.trainable:
        return lambda: None
    reference = weakref.ref(attached)

    def arrived(parameter: Tensor) -> None:
        if (alive := reference()) is not None and _is_warming_up(alive):
            parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
        for parameter in router_parameters(attached).values()
    ]
    stop = hooks.follow_optimizers(attached, _drop_before_step, _do_nothing)

    def undo() -> None:
        stop()
        for handle in handles:
            handle.remove()

    return undo


def _is_warming_up(attached: Attached) -> bool:
    """Asked within backward passes, so it does not let the engine wait for a device.

    The last step of the warmup never lets the engine wait, so one step more or less is the same.
    """
    engine = attached.engine
    steps = attached.known_steps if engine.pending else engine.step_count
    return steps < engine.config.warmup_steps


def drop_gradients(attached: Attached) -> None:
    """Drop the gradients of routers that wait for the end of the warm-up.

    ``fully_shard`` replaces parameters and their hooks, so this also follows each backward pass.
    """
    waits = attached.options.router is RouterMode.AFTER_WARMUP and attached.trainable
    if waits and _is_warming_up(attached):
        for parameter in router_parameters(attached).values():
            parameter.grad = None


def _drop_before_step(
    attached: Attached, optimizer: Optimizer, closure: hooks.Closure | None
) -> hooks.Closure | None:
    """Drop what was written after the gradients arrived, as DistributedDataParallel does.

    Its zeros would let weight decay move the routers.
    """
    if closure is None:
        if _is_warming_up(attached) and not hooks.is_trial(optimizer):
            drop_gradients(attached)
        return None
    inner = closure

    def closure_then_drop() -> object:
        loss = inner()
        drop_gradients(attached)
        return loss

    return closure_then_drop


def _do_nothing(attached: Attached, optimizer: Optimizer) -> None: ...
