"""The adapters of one model: each has a name, and exactly one of them is active.

The active one is in the forward, counts, and trains. The others are inactive: their LoRA are
children of the experts modules too, so that they move with the model, but no forward calls them,
nothing is counted for them, and their parameters require no gradients. So a model computes and
learns what it would with the active adapter alone.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator

from torch import nn

from drlora_core import AllocatorEngine
from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError
from drlora_torch.lifecycle import model as model_changes
from drlora_torch.lifecycle.running import Running
from drlora_torch.step.tracker import StepTracker

ATTRIBUTE = "_drlora_adapters"  # of the model, while it has adapters
DRIVEN = (
    "the adapter makes its steps after those of the optimizer (or in adapter.step(), with "
    "auto_step=False), adapter.restore(path) loads a state, and adapter.detach() gives it back"
)


class Residents:
    """The adapters of one model, and what is done to the model once for all of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_name: dict[str, Attached] = {}  # in the order they came
        self.running: Running | None = None  # None only while the model has no adapter
        self._undo = contextlib.ExitStack()
        self._undo_by_name: dict[str, contextlib.ExitStack] = {}
        self._undo_hiding = contextlib.ExitStack()

    @classmethod
    def of(cls, model: nn.Module) -> Residents:
        """Those of a model, which may have none."""
        found = vars(model).get(ATTRIBUTE)
        return found if isinstance(found, cls) else cls(model)

    def add(self, attached: Attached) -> None:
        """Put an adapter into the model and make it the active one; a failure leaves no trace."""
        attached.engine.driver.take(attached, DRIVEN)
        self.by_name[attached.name] = attached
        self._undo_by_name[attached.name] = contextlib.ExitStack()
        try:
            if len(self.by_name) == 1:
                vars(self.model)[ATTRIBUTE] = self
                self._undo.callback(vars(self.model).pop, ATTRIBUTE, None)
                self._undo.callback(model_changes.freeze(self.model))
                self._undo.callback(model_changes.let_checkpointing_reach_lora(self.model))
                self._undo.callback(model_changes.say_that_adapters_are_there(self.model))
            name = child_name(attached.name)
            for module, lora in adapted_modules(attached):
                module.add_module(name, lora)
                self._undo_by_name[attached.name].callback(module._modules.pop, name)
            self._hide_from_checkpoints()
            self.activate(attached)
        except BaseException:
            self.remove(attached)
            raise

    def undo_with(self, attached: Attached | None, undo: Callable[[], object]) -> None:
        """Have something undone when an adapter leaves; None: when the last one does."""
        stack = self._undo if attached is None else self._undo_by_name[attached.name]
        stack.callback(undo)

    def activate(self, attached: Attached) -> None:
        """Let an adapter take the place of the active one; a failure leaves that one active.

        Raises:
            AttachError: the active one is disabled.
        """
        before = self.active
        if before is attached:
            return
        self.check_not_disabled()
        self._stop()
        try:
            self._start(attached)
        except BaseException:
            self._stop()
            if before is not None:
                self._start(before)
            raise

    def remove(self, attached: Attached) -> None:
        """Take an adapter out; if it was active, the last of the others to come is now."""
        if self.active is attached:
            self._stop()
        self._undo_by_name.pop(attached.name).close()
        del self.by_name[attached.name]
        attached.engine.driver.give_back()
        self._hide_from_checkpoints()
        if not self.by_name:
            self._undo.close()
        elif self.running is None:
            self._start(next(reversed(self.by_name.values())))

    @property
    def active(self) -> Attached | None:
        """The active adapter."""
        return None if self.running is None else self.running.attached

    def check_not_disabled(self) -> None:
        """Refuse to switch while the model is to be the base model."""
        if self.active is not None and not self.active.enabled:
            raise AttachError(
                f"adapters cannot be switched inside disabled() of {self.active.name!r}, the "
                "active one"
            )

    def _start(self, attached: Attached) -> None:
        self.running = Running(attached)
        self.running.start(self._all)

    def _stop(self) -> None:
        if self.running is not None:
            self.running.stop()
            self.running = None

    def _all(self) -> Iterator[Attached]:
        return iter(self.by_name.values())

    def _hide_from_checkpoints(self) -> None:
        self._undo_hiding.close()
        ours = [lora for attached in self.by_name.values() for _, lora in adapted_modules(attached)]
        if ours:
            hide = model_changes.keep_out_of_checkpoints
            self._undo_hiding.callback(hide(self.model, ours))


def adapted_modules(attached: Attached) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules that an adapter adapts, and what it adds to each as a child."""
    yield from ((layer.experts, layer.lora) for layer in attached.layers.values())
    yield from ((each.linear, each.lora) for each in attached.dense.values())


def user_of(engine: AllocatorEngine) -> Attached | None:
    """The adapter, of any model, whose ranks an engine decides; None for a free engine."""
    owner = engine.driver.owner
    return owner if isinstance(owner, Attached) else None


def is_active(attached: Attached) -> bool:
    """True for the adapter that its model runs with."""
    return bool(attached.layers) and Residents.of(attached.model).active is attached


def tracker_of(attached: Attached) -> StepTracker | None:
    """The tracker of an active adapter; None for others."""
    running = Residents.of(attached.model).running
    return running.tracker if running is not None and running.attached is attached else None


def check_attached(attached: Attached) -> None:
    """Refuse what only an adapter that is in its model can do."""
    if attached.merged is not None:
        raise AttachError(
            "this adapter is merged into the weights of the model; call adapter.unmerge() first"
        )
    if not attached.layers:
        raise AttachError("this adapter was detached or merged; attach a new one")


def active_tracker(attached: Attached) -> StepTracker:
    """The tracker of an adapter that has to be the active one.

    Raises:
        AttachError: it is not.
    """
    check_attached(attached)
    if (tracker := tracker_of(attached)) is not None:
        return tracker
    active = Residents.of(attached.model).active
    raise AttachError(
        f"adapter {attached.name!r} is not active ({active.name!r} is); call its activate() first"
        if active is not None
        else f"adapter {attached.name!r} is not active"
    )


def check_name(name: object, taken: Collection[str]) -> None:
    """Refuse what cannot name a new adapter: it becomes part of the names of parameters."""
    if not isinstance(name, str) or re.fullmatch(r"[\w-]+", name) is None:
        raise AttachError(
            f"adapter_name must be made of letters, digits, '_' and '-', got {name!r}"
        )
    if name in taken:
        raise AttachError(
            "the model has an adapter already; call its detach() or merge() first, or choose "
            f"another adapter_name than {name!r} (taken: {', '.join(map(repr, taken))})"
        )


def child_name(adapter_name: str) -> str:
    """Name of an adapter's ExpertLoRA in the modules that it adapts.

    Example:
        >>> child_name("default"), child_name("law")
        ('drlora', 'drlora_law')
    """
    return "drlora" if adapter_name == "default" else f"drlora_{adapter_name}"
