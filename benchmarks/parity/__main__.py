"""``python -m benchmarks.parity``: run all modes and write docs/parity.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.parity.compare import compare, compare_files
from benchmarks.parity.modes import MODES
from benchmarks.parity.page import write_page

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
WORLDS = (2, 4, 3, 5)


def main(
    steps: Annotated[int, typer.Option(min=12, help="Steps with two processes.")] = 100,
    more: Annotated[int, typer.Option(min=12, help="Steps with three to five.")] = 25,
    page: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
) -> None:
    """Compare every way to spread a model over processes with one process."""
    console = Console(stderr=True)
    found = []
    for world in track(WORLDS, "numbers of processes", console=console):
        chosen = [mode for mode in MODES if world in mode.worlds]
        found += compare(world, chosen, steps if world == 2 else more)
    passages = compare_files(checkpoints=True)
    page.write_text(write_page(found, passages))
    wrong = [each for each in found if not each.agrees]
    for each in wrong:
        mode = MODES[each.mode]
        console.print(f"{mode.group}: {mode.name}, {each.world} processes: {each}")
    console.print(f"{len(found) - len(wrong)} of {len(found)} modes agree; {page}")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
