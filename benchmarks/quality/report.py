"""``python -m benchmarks.quality report``: from results files to docs/results.md."""

# typer reads these annotations at run time, where Python 3.10 wants Optional.
# ruff: noqa: UP045

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import typer

from benchmarks.quality import plots, tables
from benchmarks.quality.document import read_notes, render
from benchmarks.quality.runs import read
from drlora_core.cli import common

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def known_relevance(model: str, task: str) -> Mapping[str, np.ndarray] | None:
    """Relevance of each expert by layer where it is known by construction, else None."""
    from benchmarks.quality.controlled import relevance

    try:
        return {name: np.array(values) for name, values in relevance(model, task).items()}
    except ValueError:
        return None


def report(
    results: Annotated[
        Optional[list[Path]],
        typer.Argument(
            help="Results files (default: all of benchmarks/quality/results but smoke)."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Markdown; *_notes.md beside it is put in.")
    ] = PAGE,
    html: Annotated[
        Optional[Path], typer.Option("--html", help="Also write a page of interactive figures.")
    ] = None,
) -> None:
    """Write the tables, verdicts and pictures of a study."""
    try:
        runs = read(results or _all_results())
        notes = read_notes(output.with_name(f"{output.stem}_notes.md"))
        output.write_text(render(runs, notes, known_relevance), encoding="utf-8")
        common.table("Claims", [_short(row) for row in tables.claims(runs)])
        common.say(f"wrote {output}")
        if html is not None:
            html.write_text(plots.page(runs, known_relevance), encoding="utf-8")
            common.say(f"wrote {html}")
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _all_results() -> list[Path]:
    """Every results file but that of the smoke profile, whose figures say nothing."""
    return sorted(path for path in RESULTS.glob("*.jsonl") if path.stem != "smoke")


def _short(row: Mapping[str, str]) -> dict[str, str]:
    """Columns that fit into a terminal."""
    shown = ("Claim", "Here, test loss (nats)", "Verdict by test loss")
    return {name: row[name] for name in shown}
