"""Switch an adapter off for a while: its LoRA, or its statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from drlora_torch.attached import Attached
from drlora_torch.lifecycle.residents import active_tracker, check_attached, is_active
from drlora_torch.lifecycle.trained import show_trained


@contextlib.contextmanager
def disabled(attached: Attached) -> Iterator[None]:
    """Inside, the model is the base model, routers included; nothing is counted."""
    active_tracker(attached)
    before, attached.enabled = attached.enabled, False
    show_trained(attached, False)
    try:
        yield
    finally:
        attached.enabled = before
        if is_active(attached):
            show_trained(attached, before)


@contextlib.contextmanager
def paused(attached: Attached) -> Iterator[None]:
    """Inside, no statistics are taken and optimizer steps do not count."""
    check_attached(attached)
    before, attached.paused = attached.paused, True
    try:
        yield
    finally:
        attached.paused = before
