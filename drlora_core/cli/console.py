"""Consoles of all commands: the width of a terminal, none in a pipe, and what can be encoded.

This module needs rich and errors alone, so that code below the command line can use it too.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from drlora_core.errors import printable

UNBOUNDED = 10_000  # columns of a pipe: no line is folded there
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", ".:-=+*#@"  # eight heights


class _SafeConsole(Console):
    """A console on which no text steers the terminal; styles and cursors are rich's own."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def make_console(*, stderr: bool = False) -> Console:
    """Return a console for standard output, or for standard error.

    In a pipe nothing is folded, unless the variable COLUMNS says how wide it is. Where the encoding
    is not UTF-8, rich draws tables and bars in ASCII.

    Example:
        >>> make_console().width > 0
        True
    """
    console = _SafeConsole(stderr=stderr)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return _SafeConsole(stderr=stderr, width=UNBOUNDED)


def say(text: str, console: Console | None = None) -> None:
    """Print a text as it is: brackets are no markup, and numbers are not colored."""
    (console or make_console()).print(text, markup=False, highlight=False)


def blocks(console: Console) -> str:
    """Return eight characters for bars, the lowest first, that the console can show.

    Example:
        >>> blocks(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii")))
        '.:-=+*#@'
    """
    return ASCII_BLOCKS if console.options.ascii_only else BLOCKS


def is_unicode(stream: object) -> bool:
    """Return True if a stream encodes every character."""
    return str(getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def soften_output() -> None:
    """Let standard output write ``?`` for a character that it cannot encode, such as in a name.

    UTF-8 cannot encode bytes of a file's name that are no text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
