"""Tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.quality.cells import Rows


def print_table(title: str, rows: Rows) -> None:
    """Print rows as a table; lines are not cut if the output is not a terminal."""
    if not rows:
        return
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
