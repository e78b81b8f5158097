"""Write the report of a run into its folder."""

from __future__ import annotations

from pathlib import Path

from drlora_core.atomic import write_text
from drlora_core.report.page import render_run
from drlora_core.runs import Run, open_run
from drlora_core.runs.folder import REPORT


def write_report(path: Path, output: Path | None = None, against: Run | None = None) -> Path:
    """Write the report of a run, and return where it is.

    Args:
        path: the run's folder, a recording, or a trace.
        output: default: ``report.html`` in the run's folder, or beside the recording. A symbolic
            link there is replaced, never followed.
        against: a run to compare with.

    Raises:
        LayoutError: there is no recording, or the runs have different layers.
        DRLoRAError: a library of the extra ``report`` is missing.
        OSError: the page cannot be written; an older one is left as it was.
    """
    run = open_run(path)
    place = path if run.path is None else run.path
    inside = place.is_dir() and run.recording.path != place
    target = output or (place if inside else place.resolve().parent) / REPORT
    write_text(target, render_run(run, against))
    return target
