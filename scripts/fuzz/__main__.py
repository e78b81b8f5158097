"""Fuzz the readers: `python -m scripts.fuzz --help`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from scripts.fuzz.attempts import ALL, fuzz_plainly


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(ALL)}.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Damaged inputs of each reader.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the damage.")] = 0,
) -> None:
    """Damage the files that drlora reads, and look for anything but a clear error.

    Every reader has to end within 2 seconds and 200 MiB with a value or an error of ours. Inputs
    of findings are kept in the folder fuzz-findings; the exit status is 1 if there are any.
    """
    console = Console(stderr=True)
    found = {name: fuzz_plainly(name, runs, seed, console) for name in names or ALL}
    for name, number in found.items():
        print(f"{name}: {runs} damaged inputs, {number} kinds of findings")
    raise SystemExit(any(found.values()))


if __name__ == "__main__":
    typer.run(main)
