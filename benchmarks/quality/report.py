"""``python -m benchmarks.quality report``: write docs/results.md and docs/results/."""

# typer reads these annotations at run time, where Python 3.10 wants Optional.
# ruff: noqa: UP045

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import typer

from benchmarks.quality import claim_tables, details, page, plots
from benchmarks.quality.claims import ALL_CLAIMS
from benchmarks.quality.controlled import relevance
from benchmarks.quality.errors import StudyError
from benchmarks.quality.notes import read_notes
from benchmarks.quality.runs import Results, read
from benchmarks.quality.terminal import print_table
from drlora_core.atomic import replaced_files, write_text

RESULTS = Path(__file__).parent / "results"
HEADINGS = (*page.HEADINGS, *details.TITLES)
"""Headings that the notes may have."""
PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def known_relevance(model: str, task: str) -> Mapping[str, np.ndarray] | None:
    """Relevance of each expert by layer if it is known by construction, else None."""
    try:
        return {name: np.array(values) for name, values in relevance(model, task).items()}
    except ValueError:
        return None


def report(
    results: Annotated[
        Optional[list[Path]],
        typer.Argument(
            help="Results files (default: all of benchmarks/quality/results except smoke)."
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Main page, Markdown. Details go to a folder of the same name beside it; "
            "*_notes.md beside it is included.",
        ),
    ] = PAGE,
    html: Annotated[
        Optional[Path], typer.Option("--html", help="Also write a page of interactive figures.")
    ] = None,
) -> None:
    """Write the report of a study: claims and verdicts, and all tables."""
    try:
        runs = read(results or _all_results())
        write_report(runs, output)
        shown = ("Claim", "Test loss", "Verdict")
        rows = claim_tables.claims(runs, ALL_CLAIMS)
        print_table("Claims", [{name: row[name] for name in shown} for row in rows])
        typer.echo(f"wrote {output} and {output.with_suffix('')}/")
        if html is not None:
            write_text(html, plots.page(runs, known_relevance))
            typer.echo(f"wrote {html}")
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def write_report(runs: Results, output: Path) -> None:
    """Write the main page, and its details into the folder of the same name.

    Raises:
        StudyError: the path does not end in .md, or the notes beside it cannot be used.
        OSError: a file cannot be written.
    """
    if output.suffix != ".md":
        raise StudyError(f"--output must end in .md, got {str(output)!r}")
    path = output.with_name(f"{output.stem}_notes.md")
    notes = read_notes(path, runs)
    for name in notes.keys() - HEADINGS:
        raise StudyError(f"{path}: no heading {name!r}; the report has {', '.join(HEADINGS)}")
    others = details.detail_pages(runs, notes, known_relevance)
    text = page.main_page(runs, notes, known_relevance, others, output.stem)
    with replaced_files(output.with_suffix(""), stale="*.md") as folder:
        for each in others:
            write_text(folder / each.name, each.text)
    write_text(output, text)


def _all_results() -> list[Path]:
    """All results files except that of the smoke profile, which is too small to mean anything."""
    return sorted(path for path in RESULTS.glob("*.jsonl") if path.stem != "smoke")
