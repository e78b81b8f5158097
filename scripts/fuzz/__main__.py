"""Fuzz the readers: `python -m scripts.fuzz --help`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from scripts.fuzz.attempts import ALL, fuzz_plainly


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(ALL)}.")] = None,
    runs: Annotated[
        int, typer.Option(min=1, help="Damaged inputs of each reader; fewer of the slow ones.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Of the damage.")] = 0,
) -> None:
    """Damage the files that drlora reads, and look for anything but a clear error.

    Every reader has to end within 2 seconds and 200 MiB with a value or an error of ours. Inputs
    of findings are kept in the folder fuzz-findings; the exit status is 1 if there are any.
    """
    console = Console(stderr=True)
    shares = {name: ALL[name].share_of(runs) for name in names or ALL}
    found = {name: fuzz_plainly(name, share, seed, console) for name, share in shares.items()}
    for name, number in found.items():
        print(f"{name}: {shares[name]:,} damaged inputs, {number} kinds of findings")
    print(f"{sum(shares.values()):,} damaged inputs in all")
    raise SystemExit(any(found.values()))


if __name__ == "__main__":
    typer.run(main)
