"""Tables that fit: no cell is cut off; where the columns do not fit, each row becomes a block."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from drlora_core.cli.console import make_console, say
from drlora_core.errors import printable

FRAME = 3  # characters of a column beside its text: a border and two spaces
Row = Mapping[str, Any]


def show_table(
    title: str,
    rows: Sequence[Row],
    note: str | None = None,
    *,
    figures: Collection[str] = (),
    spare: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Print rows as a table, or as blocks of ``name: value`` on a narrow console.

    Args:
        title: a line above the table.
        rows: cells by column. Numbers are right-aligned and never folded; underscores of names
            become spaces.
        note: a line below the table.
        figures: columns of texts that are treated as numbers.
        spare: columns to leave out where the table does not fit, the first one first; a line says
            so.
        console: default: standard output.
    """
    if not rows:
        return
    console = console or make_console()
    numbers = {name for name, cell in rows[0].items() if not isinstance(cell, str)} | {*figures}
    dropped: list[str] = []
    widths = _least_widths(rows, numbers)
    while _whole(widths) > console.width and len(dropped) < len(spare):
        dropped.append(spare[len(dropped)])
        del widths[dropped[-1]]
    console.print(Text(title, style="bold"))
    if _whole(widths) > console.width:
        _show_blocks(rows, console)
    else:
        _print_stripped(_make_table(rows, widths, numbers, console.width), console)
        if dropped:
            say(f"no room for: {', '.join(map(header, dropped))}; --json has all", console)
    if note:
        say(note, console)


def _least_widths(rows: Sequence[Row], numbers: Collection[str]) -> dict[str, int]:
    """Return the width of each column if only texts and headers are folded, between words.

    Numbers, and lines of a text with several, are not folded.
    """
    widths = {}
    for name in rows[0]:
        words = header(name).split()
        for cell in (format_cell(row[name]) for row in rows):
            whole = name in numbers or "\n" in cell
            words += cell.splitlines() if whole else cell.split()
        widths[name] = max(map(len, words), default=0)
    return widths


def _whole(widths: Mapping[str, int]) -> int:
    return 1 + sum(width + FRAME for width in widths.values())


def _make_table(
    rows: Sequence[Row], widths: Mapping[str, int], numbers: Collection[str], room: int
) -> Table:
    """Make a table of the columns that have a width, which is the least."""
    cells = {name: [format_cell(row[name]) for row in rows] for name in widths}
    lines = {n: [header(n), *"\n".join(column).splitlines()] for n, column in cells.items()}
    natural = {name: max(map(len, texts)) for name, texts in lines.items()}
    fitted = _share_room(widths, natural, room)
    made = Table()
    for name, width in fitted.items():
        justify: Any = "right" if name in numbers else "left"
        made.add_column(header(name), justify=justify, width=width, overflow="fold")
    for row in zip(*cells.values(), strict=True):
        made.add_row(*map(Text, row))
    return made


def _share_room(least: Mapping[str, int], natural: Mapping[str, int], room: int) -> dict[str, int]:
    """Widen columns from their least to their natural width, as far as there is room.

    The column that lacks least comes first, so that only long texts are folded. rich would take
    room from the widest column, and so break its words.
    """
    widths, left = dict(least), room - _whole(least)
    for name in sorted(widths, key=lambda name: natural[name] - widths[name]):
        given = min(natural[name] - widths[name], left)
        widths[name] += given
        left -= given
    return widths


def _print_stripped(made: Table, console: Console) -> None:
    """Print a table without the spaces that rich puts at the end of lines, if into a pipe."""
    if console.is_terminal:
        console.print(made)
        return
    with console.capture() as captured:
        console.print(made)
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def _show_blocks(rows: Sequence[Row], console: Console) -> None:
    """Print ``name: value`` lines; the first cell of a row is the headline of its block."""
    for row in rows:
        (first, headline), *others = row.items()
        label = "" if isinstance(headline, str) else f"{header(first)} "
        say(f"  {label}{format_cell(headline)}", console)
        for name, value in others:
            say(f"    {header(name)}: {'; '.join(format_cell(value).splitlines())}", console)


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
    return f"{value:.3f}" if isinstance(value, float) else printable(str(value))
