"""Write the report of a run into its folder."""

from __future__ import annotations

from pathlib import Path

from drlora_core.atomic import write_text
from drlora_core.errors import LayoutError
from drlora_core.report.page import render_run
from drlora_core.runs import Run
from drlora_core.runs.folder import REPORT


def write_report(run: Run, output: Path | None = None, against: Run | None = None) -> Path:
    """Write the report of a run, and return where it is.

    Args:
        run: opened with `drlora_core.runs.open_run`.
        output: default: ``report.html`` in the run's folder, or beside the recording. A symbolic
            link there is replaced, never followed.
        against: a run to compare with.

    Raises:
        LayoutError: the runs have different layers, or this one was not read from files and there
            is no ``output``.
        DRLoRAError: a library of the extra ``report`` is missing.
        OSError: the page cannot be written; an older one is left as it was.
    """
    target = output or _beside(run)
    write_text(target, render_run(run, against))
    return target


def _beside(run: Run) -> Path:
    if run.path is None:
        raise LayoutError("the run is in memory; say where to write its report: output=...")
    inside = run.path.is_dir() and run.recording.path != run.path
    return (run.path if inside else run.path.resolve().parent) / REPORT
