"""Follow the user's own optimizer, so that nothing has to be called in the training loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from drlora_torch.errors import AttachError
from drlora_torch.importance import slot_importance

if TYPE_CHECKING:
    from drlora_torch.adapter import Adapter


class OptimizerFollower:
    """Reads importance before the step of the optimizer that holds the LoRA, closes it after.

    torch calls its global hooks for every optimizer, in Trainer, Accelerate and ``GradScaler``
    too; ours is recognised by the identity of its parameters. A step that ``GradScaler`` skips
    never reaches the hooks, or comes with ``found_inf`` (fused optimizers).
    """

    _all: ClassVar[list[OptimizerFollower]] = []

    def __init__(self, adapter: Adapter) -> None:
        # Global hooks must not keep a model alive; the model itself keeps its adapter.
        self._adapter = weakref.ref(adapter)
        self._own = {id(p) for layer in adapter.layers.values() for p in layer.lora.parameters()}
        self._slots: dict[str, Tensor | None] | None = None
        self._handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        self._remove_orphans()
        self._all.append(self)

    def remove(self) -> None:
        """Stop following."""
        for handle in self._handles:
            handle.remove()
        self._all.remove(self)

    def _remove_orphans(self) -> None:
        """Take out the hooks of adapters that were dropped without ``detach``.

        Not when the garbage collector finds them: that may be in the middle of an optimizer's
        step, where torch is going through its hooks.
        """
        for follower in list(self._all):
            if follower._adapter() is None:
                follower.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._slots = None
        adapter = self._adapter()
        if adapter is None or not self._holds_lora(optimizer, adapter.options.auto_step):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._read(adapter, optimizer)
            return None

        def closure_then_read() -> Any:
            loss = closure()
            self._read(adapter, optimizer)
            return loss

        return _with_closure(args, kwargs, closure_then_read)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        adapter = self._adapter()
        slots, self._slots = self._slots, None
        if adapter is None or slots is None:
            return
        adapter.optimizer_stepped(optimizer, slots)

    def _read(self, adapter: Adapter, optimizer: Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and bool(found_inf.any()):
            return  # a fused optimizer will leave the parameters as they are
        scale = getattr(optimizer, "grad_scale", None)
        if all(parameter.grad is None for parameter in adapter.lora_parameters()):
            return  # this step does not train the adapter
        read = {} if adapter.is_paused else adapter.layers
        slots = {name: slot_importance(layer.lora) for name, layer in read.items()}
        if isinstance(scale, Tensor):
            slots = {
                name: None if values is None else values / scale.to(values)
                for name, values in slots.items()
            }
        self._slots = slots
        adapter.newborn.before_step(optimizer)

    def _holds_lora(self, optimizer: Optimizer, alone: bool) -> bool:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]} & self._own
        if alone and held and len(held) < len(self._own):
            raise AttachError(
                f"the optimizer holds {len(held)} of the adapter's {len(self._own)} LoRA "
                "parameters; wrong:\n    AdamW(some of adapter.parameters())\nright:\n"
                "    AdamW(adapter.parameters())\nor attach(..., auto_step=False) and call "
                "adapter.step() once all optimizers have stepped"
            )
        return bool(held)


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``step`` with another closure; ``args[0]`` is the optimizer."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}
