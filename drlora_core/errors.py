"""The errors a user can cause, all of them ``ValueError``s with a sentence that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DRLoRAError(ValueError):
    """Base class of every error that drlora raises on purpose."""


class TimetableError(DRLoRAError):
    """Growth events cannot be laid into a training as asked."""


class UnknownLayerError(DRLoRAError):
    """A layer name that the engine (or the model) does not have."""


class LayoutError(DRLoRAError):
    """Layers, expert counts or a saved state do not fit the engine that got them."""


class StatisticError(DRLoRAError):
    """A routing or importance sample has a wrong shape or holds impossible values."""


class StepOrderError(DRLoRAError):
    """``observe`` and ``step`` were called in an order that loses or repeats statistics."""


class PolicyError(DRLoRAError):
    """An allocation policy returned something that is not a valid allocation."""


def near_misses(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: close names, or the names there are.

    Example:
        >>> near_misses("layers.0", ["layer.0", "layer.1"])
        "did you mean 'layer.0' or 'layer.1'?"
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    if not names:
        return "there are none yet"
    shown = ", ".join(repr(known_name) for known_name in names[:5])
    return f"known: {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
