"""Consoles of all commands: the width of a terminal, none in a pipe, and what can be encoded.

This module needs rich alone, so that code below the command line can use it too.
"""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console

UNBOUNDED = 10_000  # columns of a pipe: no line is folded there
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", ".:-=+*#@"  # eight heights


def make_console(*, stderr: bool = False) -> Console:
    """Return a console for standard output, or for standard error.

    In a pipe nothing is folded, unless the variable COLUMNS says how wide it is. Where the encoding
    is not UTF-8, rich draws tables and bars in ASCII.

    Example:
        >>> make_console().width > 0
        True
    """
    console = Console(stderr=stderr)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(stderr=stderr, width=UNBOUNDED)


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
