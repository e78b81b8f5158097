"""Tables that fit: no cell is cut off; where the columns do not fit, each row becomes a block."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from drlora_core.cli.console import make_console, say

FRAME = 3  # characters of a column beside its text: a border and two spaces
Row = Mapping[str, Any]


def show_table(
    title: str,
    rows: Sequence[Row],
    note: str | None = None,
    *,
    figures: Collection[str] = (),
    console: Console | None = None,
) -> None:
    """Print rows as a table, or as blocks of ``name: value`` on a narrow console.

    Numbers, and texts in the columns ``figures``, are right-aligned and never folded. Underscores
    of names become spaces.
    """
    if not rows:
        return
    console = console or make_console()
    numbers = {name for name, cell in rows[0].items() if not isinstance(cell, str)} | {*figures}
    if _narrowest(rows, numbers) > console.width:
        _show_blocks(title, rows, note, console)
        return
    made = Table(title=title, title_justify="left", title_style="bold", caption=note)
    made.caption_justify = "left"
    for name in rows[0]:
        is_number = name in numbers
        justify: Any = "right" if is_number else "left"
        made.add_column(header(name), justify=justify, no_wrap=is_number, overflow="fold")
    for row in rows:
        made.add_row(*(Text(format_cell(value)) for value in row.values()))
    with console.capture() as captured:
        console.print(made)
    text = captured.get()
    if not console.is_terminal:  # rich pads lines to the width of the table
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    console.file.write(text)


def _narrowest(rows: Sequence[Row], numbers: Collection[str]) -> int:
    """Return the width of the table if only texts are folded, and those between words."""
    width = 1
    for name in rows[0]:
        cells = [format_cell(row[name]) for row in rows]
        words = header(name).split()
        for cell in cells:
            words += [cell] if name in numbers else cell.split()
        width += max(map(len, words), default=0) + FRAME
    return width


def _show_blocks(title: str, rows: Sequence[Row], note: str | None, console: Console) -> None:
    """Print ``name: value`` lines; the first cell of a row is the headline of its block."""
    say(title, console)
    for row in rows:
        (first, headline), *others = row.items()
        label = "" if isinstance(headline, str) else f"{header(first)} "
        say(f"  {label}{format_cell(headline)}", console)
        for name, value in others:
            say(f"    {header(name)}: {format_cell(value)}", console)
    if note:
        say(note, console)


def header(name: str) -> str:
    """Return the name of a column as people read it.

    Example:
        >>> header("mean_rank")
        'mean rank'
    """
    return name.replace("_", " ")


def format_cell(value: Any) -> str:
    """Format a table cell; - where there is no value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
