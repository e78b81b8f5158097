"""Several adapters on one model: each has a name, and exactly one of them is active.

The active one is in the forward, counts, and trains. The others rest: their LoRA are children of
the experts modules too, so that they move with the model, but no forward calls them, nothing is
counted for them, and their parameters require no gradient. So a model computes and learns what it
would with the active adapter alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from drlora_core.errors import near_misses
from drlora_torch import preparing
from drlora_torch.errors import AttachError, ModelError
from drlora_torch.integrations.beside_peft import unwrapped

if TYPE_CHECKING:
    from drlora_torch.adapter import Adapter

ATTRIBUTE = "_drlora_adapters"  # of the model, while it has adapters


class NamedAdapters:
    """The adapters of one model, and what is done to the model once for all of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_name: dict[str, Adapter] = {}  # in the order they came
        self.active: Adapter | None = None  # None only while the model has none
        self._undo: list[Callable[[], None]] = []
        self._uncover: Callable[[], None] = _nothing

    @classmethod
    def of(cls, model: nn.Module) -> NamedAdapters:
        """Those of a model, which may have none."""
        found = vars(model).get(ATTRIBUTE)
        return found if isinstance(found, cls) else cls(model)

    def add(self, adapter: Adapter) -> None:
        """Put an adapter into the model and make it the active one; a failure leaves no trace."""
        self.by_name[adapter.name] = adapter
        adapter.named = self
        try:
            if len(self.by_name) == 1:
                vars(self.model)[ATTRIBUTE] = self
                self._undo.append(preparing.freeze(self.model))
                self._undo.append(preparing.let_checkpointing_reach_lora(self.model))
            adapter.put_in()
            self._keep_out_of_checkpoints()
            self.activate(adapter)
        except BaseException:
            self.remove(adapter)
            raise

    def activate(self, adapter: Adapter) -> None:
        """Let an adapter take the place of the active one.

        Raises:
            AttachError: the active one is disabled.
        """
        before = self.active
        if before is adapter:
            return
        self.check_not_disabled()
        if before is not None:
            before.stop()
        self.active = adapter
        try:
            adapter.start()
        except BaseException:
            adapter.stop()
            self.active = before
            if before is not None:
                before.start()
            raise

    def remove(self, adapter: Adapter) -> None:
        """Take an adapter out; if it was active, the last of the others to come is now."""
        if self.active is adapter:
            adapter.stop()
            self.active = None
        adapter.take_out()
        del self.by_name[adapter.name]
        self._keep_out_of_checkpoints()
        if not self.by_name:
            while self._undo:
                self._undo.pop()()
            vars(self.model).pop(ATTRIBUTE, None)
        elif self.active is None:
            self.activate(next(reversed(self.by_name.values())))

    def check_not_disabled(self) -> None:
        """Refuse to switch while the model is to be the base model."""
        if self.active is not None and not self.active.enabled:
            raise AttachError(
                f"adapters cannot be switched inside disabled() of {self.active.name!r}, the "
                "active one"
            )

    def _keep_out_of_checkpoints(self) -> None:
        self._uncover()
        self._uncover = _nothing
        if self.by_name:
            ours = [p for adapter in self.by_name.values() for p in adapter.lora_parameters()]
            self._uncover = preparing.keep_out_of_checkpoints(self.model, ours)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that are attached to a model, by name, in the order they came.

    Example:
        >>> from transformers import OlmoeConfig, OlmoeForCausalLM
        >>> from drlora_core import AllocatorConfig, AllocatorEngine
        >>> import drlora_torch
        >>> model = OlmoeForCausalLM(OlmoeConfig(hidden_size=8, intermediate_size=4,
        ...     num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        ...     num_experts_per_tok=2, vocab_size=16))
        >>> config = AllocatorConfig(r_init=2, r_target=4)
        >>> for name in ("law", "intent"):
        ...     adapter = drlora_torch.attach(model, AllocatorEngine(config), adapter_name=name)
        >>> {name: adapter.is_active for name, adapter in drlora_torch.adapters(model).items()}
        {'law': False, 'intent': True}
        >>> drlora_torch.set_adapter(model, "law").is_active
        True
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return dict(NamedAdapters.of(unwrapped(model)).by_name)


def set_adapter(model: nn.Module, adapter_name: str) -> Adapter:
    """Make the adapter of this name the active one; see :meth:`drlora_torch.Adapter.activate`.

    Returns:
        The adapter.

    Raises:
        AttachError: the model has no adapter of this name; the message lists near misses.
    """
    known = adapters(model)
    if adapter_name not in known:
        raise AttachError(f"no adapter {adapter_name!r}; {near_misses(str(adapter_name), known)}")
    known[adapter_name].activate()
    return known[adapter_name]


def check_name(name: object, taken: dict[str, Adapter]) -> None:
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


def _nothing() -> None:
    """Undo nothing."""
