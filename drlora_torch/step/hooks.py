"""Follow the optimizers of the process, so that nothing has to be called in the training loop.

torch calls its global hooks for every optimizer, in Trainer, Accelerate and ``GradScaler`` too. A
step that ``GradScaler`` skips never reaches the hooks, or comes with ``found_inf`` (fused
optimizers).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from drlora_torch.lora import parts
from drlora_torch.step.readback import is_on_host

Owner = TypeVar("Owner")
Closure = Callable[[], Any]
Before = Callable[[Owner, Optimizer, Closure | None], Closure | None]
"""Called with the closure of the step, or None; may return one to run in its place."""
After = Callable[[Owner, Optimizer], None]

_followers: dict[Callable[[], None], weakref.ref[Any]] = {}


def follow_optimizers(
    owner: Owner, before: Before[Owner], after: After[Owner]
) -> Callable[[], None]:
    """Call two functions around every optimizer step of the process; return what ends that.

    Args:
        owner: handed to both; only a weak reference is kept, so that hooks do not keep a model
            alive.
        before: called before the step, with the optimizer and its closure.
        after: called after the step.
    """
    reference = weakref.ref(owner)

    def pre_hook(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if (alive := reference()) is None:
            return None
        by_position = len(args) > 1  # args[0] is the optimizer
        given = args[1] if by_position else kwargs.get("closure")
        closure = before(alive, optimizer, given)
        if closure is None:
            return None
        if by_position:
            return (args[0], closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure}

    def post_hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (alive := reference()) is not None:
            after(alive, optimizer)

    handles = [
        register_optimizer_step_pre_hook(pre_hook),
        register_optimizer_step_post_hook(post_hook),
    ]

    def stop() -> None:
        for handle in handles:
            handle.remove()
        _followers.pop(stop, None)

    # Adapters that were dropped without detach lose their hooks here, not when the garbage
    # collector finds them: that may be in the middle of an optimizer's step, where torch is going
    # through its hooks.
    for stop_other, other in list(_followers.items()):
        if other() is None:
            stop_other()
    _followers[stop] = reference
    return stop


def is_at_rest(optimizer: Optimizer) -> bool:
    """True if an optimizer moves nothing.

    A learning rate on a device is taken for one that moves: to read it would wait.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    return all(not _is_elsewhere(rate) and not rate for rate in rates)


def _is_elsewhere(rate: object) -> bool:
    return isinstance(rate, Tensor) and not is_on_host(rate)


def is_trial(optimizer: Optimizer) -> bool:
    """True for a step that trains nothing.

    ``torch.distributed.checkpoint`` steps a fresh optimizer, with zeros for gradients and a
    learning rate of zero, to see its state.
    """
    held = [p.grad for group in optimizer.param_groups for p in group["params"]]
    gradients = (parts.local(gradient) for gradient in held if gradient is not None)
    return is_at_rest(optimizer) and not any(bool(each.any()) for each in gradients)


def count_held(optimizer: Optimizer, parameters: list[nn.Parameter]) -> int:
    """How many of these parameters an optimizer holds."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return sum(id(parameter) in held for parameter in parameters)
