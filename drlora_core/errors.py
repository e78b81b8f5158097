"""The errors a user can cause, all of them ``ValueError``s with a sentence that says what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError


class DRLoRAError(ValueError):
    """Base class of every error of drlora."""

    exit_code = 2
    """Exit status of a command that ends with it."""


class TimetableError(DRLoRAError):
    """The growth events do not fit into the training."""


class UnknownLayerError(DRLoRAError):
    """The engine or the model has no layer of this name."""


class LayoutError(DRLoRAError):
    """Layers, expert counts, a saved state or a file do not match what is expected."""


class StatisticError(DRLoRAError):
    """A routing or importance sample has a wrong shape or invalid values."""


class StepOrderError(DRLoRAError):
    """``observe`` and ``step`` were called in the wrong order."""


class PolicyError(DRLoRAError):
    """An allocation policy failed or returned an invalid allocation."""


# Escape sequences begin with a control character; the others turn the direction of a line around.
_CONTROLS = {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_ESCAPES = {code: f"\\u{code:04x}" for code in _CONTROLS - {*b"\n\t"}}


def printable(text: str) -> str:
    r"""Escape what could steer a terminal: names and rows come from strangers' files.

    Example:
        >>> print(printable("layer\x1b[31m"))
        layer\u001b[31m
    """
    return text.translate(_ESCAPES)


def shorten(value: object, most: int = 80) -> str:
    """Show a value in an error message, without the middle of a long one.

    Example:
        >>> shorten(10**400, 20)
        '1000000000...0000000000 (401 characters)'
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python prints neither longer integers nor deeper lists
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else "a value"
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}...{text[-(most // 2) :]} ({len(text):,} characters)"


def near_misses(name: str, known: Iterable[str]) -> str:
    """End an error message with the names closest to a wrong one, or else with the known names."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    if not names:
        return "there are none yet"
    shown = ", ".join(map(repr, names[:5]))
    return f"known: {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_layer(name: object, known: Iterable[str]) -> None:
    """Refuse a layer name that is not known."""
    if not isinstance(name, str) or name not in known:
        raise UnknownLayerError(f"no layer {name!r}; {near_misses(str(name), known)}")


def describe_validation_error(error: ValidationError) -> str:
    """Describe the first error that pydantic found, and count the others."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    text = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    if isinstance(value, (int, float, str)) and (shown := shorten(value)) not in text:
        text += f", got {shown}"
    if (more := error.error_count() - 1) > 0:
        text += f" (and {more} more)"
    return printable(f"{place}: {text}" if place else text)


def import_extra(module: str, extra: str) -> Any:
    """Import a library that only an extra of drlora installs, or name the extra in an error."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = error.name or module
        raise DRLoRAError(f'{name} is not installed: pip install "drlora[{extra}]"') from error
