"""Optimizers that cannot train the adapter: made before it, or for another one that is gone.

They hold no parameter of the adapter, so their steps go unnoticed and it never learns.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models import frameworks
from drlora_torch.step.parameters import lora_parameters, parameters_by_key

logger = logging.getLogger(__name__)
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The LoRA, as a weak reference, of every A and B that was ever active."""
MANY = 20
RIGHT = "make the optimizer after attach:\n    optimizer = AdamW(adapter.parameters())"


class ForeignOptimizers:
    """Watches the optimizers of the process that hold no parameter of one adapter."""

    _newest: ClassVar[weakref.ref[ForeignOptimizers] | None] = None
    """That of the adapter whose experts a backward pass has reached last."""

    def __init__(self, attached: Attached) -> None:
        for layer in attached.layers.values():
            for parameter in layer.lora.parameters():
                _owners[parameter] = weakref.ref(layer.lora)
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._beside: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # those of the same model
        self._steps = 0  # of others, while a backward pass waits for one of the adapter's own

    def own_step(self) -> None:
        """Note that an optimizer of the adapter steps."""
        self._steps = 0

    def reached(self) -> None:
        """Note that a backward pass has reached the experts."""
        ForeignOptimizers._newest = weakref.ref(self)

    def check(
        self, optimizer: Optimizer, attached: Attached, *, waiting: bool, has_closure: bool
    ) -> None:
        """Refuse or report an optimizer that should have been made for this adapter.

        Args:
            optimizer: one that is about to step, and holds no LoRA parameter of the adapter.
            attached: the adapter.
            waiting: True if a backward pass has reached its experts since its last step.
            has_closure: the gradients of the step are not there yet.

        Raises:
            AttachError: the optimizer holds only what ``attach`` has frozen, or the LoRA of an
                adapter that is gone, or it belongs to a framework that steps copies.
        """
        newest = None if ForeignOptimizers._newest is None else ForeignOptimizers._newest()
        if not waiting or newest is not self:
            return
        frameworks.check_running()
        if optimizer in self._beside:
            self._count_step(attached)
        if optimizer in self._known:
            return
        self._known.add(optimizer)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        of_model = {id(p) for p in attached.model.parameters()}
        if any(id(parameter) in of_model for parameter in held):
            self._beside.add(optimizer)
            self._count_step(attached)
        if _is_of_another_adapter(held, attached):
            return
        try:
            _refuse_useless(optimizer, held, attached)
        except AttachError:
            self._known.discard(optimizer)
            raise
        ours = {id(p) for p in parameters_by_key(attached).values()}
        beside = has_closure or any(id(parameter) in ours for parameter in held)
        if not beside and all(parameter.grad is None for parameter in held):
            logger.warning(
                "a %s steps that has no gradients and holds nothing of adapter %r, whose experts a "
                "backward pass has just reached: does it belong to an earlier model? %s",
                type(optimizer).__name__,
                attached.name,
                RIGHT,
            )

    def _count_step(self, attached: Attached) -> None:
        self._steps += attached.options.auto_step
        if self._steps == MANY:
            logger.warning(
                "%d optimizer steps since the last one that trains the expert LoRA of adapter %r, "
                "which has gradients: no optimizer may hold it; make the optimizer from "
                "adapter.parameters(), after attach and after get_peft_model",
                MANY,
                attached.name,
            )


def check_fresh(optimizer: Optimizer, attached: Attached) -> None:
    """Refuse an optimizer that goes on with an earlier run, for an adapter that starts anew.

    Raises:
        AttachError: the optimizer was loaded, and the adapter was not.
    """
    if optimizer in attached.optimizers or attached.paused or attached.engine.step_count:
        return
    if any(_was_moved(optimizer.state.get(p, {})) for p in lora_parameters(attached)):
        raise AttachError(
            f"the {type(optimizer).__name__} has state of the LoRA from an earlier run, but "
            f"adapter {attached.name!r} is a fresh one; bring it back before training goes on: "
            "adapter.restore(path), drlora_torch.load(model, path), or a Trainer with "
            "callbacks=[DRLoRACallback(adapter)]"
        )


def _was_moved(state: Mapping[str, Any]) -> bool:
    """True if an optimizer has counted steps; some make the rest of their state in advance."""
    return bool(state.get("step", 0) > 0)


def _is_of_another_adapter(held: list[nn.Parameter], attached: Attached) -> bool:
    """True for an optimizer of another adapter of the same model, which is inactive now."""
    loras = [module for module in attached.model.modules() if isinstance(module, ExpertLoRA)]
    inside = {id(parameter) for lora in loras for parameter in lora.parameters()}
    return any(id(parameter) in inside for parameter in held)


def _refuse_useless(optimizer: Optimizer, held: list[nn.Parameter], attached: Attached) -> None:
    """Refuse an optimizer that trains nothing of this model, but was made for it."""
    loras = {id(layer.lora) for layer in attached.layers.values()}
    if any(parameter in _owners and id(_owners[parameter]()) in loras for parameter in held):
        raise AttachError(
            f"the {type(optimizer).__name__} holds the LoRA of adapter {attached.name!r} as it was "
            "before fully_shard, which replaces parameters: it would train nothing; wrong:\n"
            "    optimizer = AdamW(adapter.parameters())\n    fully_shard(model)\nright:\n"
            "    fully_shard(model)\n    optimizer = AdamW(adapter.parameters())"
        )
    if any(parameter in _owners and _owners[parameter]() is None for parameter in held):
        raise AttachError(
            f"the {type(optimizer).__name__} holds the LoRA of an adapter that is gone and "
            f"nothing of adapter {attached.name!r}: it would train nothing; {RIGHT}"
        )
    own = {id(p) for p in attached.model.parameters()}
    ours = {id(p) for p in parameters_by_key(attached).values()}
    of_base = [p for p in held if id(p) in own and id(p) not in ours]
    if of_base and not any(p.requires_grad for p in of_base):
        raise AttachError(
            f"the {type(optimizer).__name__} holds {len(of_base)} parameters of the model, which "
            f"attach has frozen, and no LoRA of adapter {attached.name!r}, which would not learn; "
            f"{RIGHT}"
        )
