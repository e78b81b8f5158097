"""``drlora report``: an HTML page about a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from drlora_core.atomic import write_text
from drlora_core.cli import common
from drlora_core.diagnostics import diagnose
from drlora_core.errors import LayoutError
from drlora_core.replay import replay
from drlora_core.report import event_rows, render


def report(
    run_dir: Annotated[
        Path, typer.Argument(help="A run's directory with a recording, or the recording itself.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: report.html in RUN_DIR.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print events, ranks and findings; write no page.")
    ] = False,
) -> None:
    """Write a self-contained HTML page: events, rank maps and trajectories, diagnostics."""
    path = common.find_recording(run_dir)
    opened = common.open_recording(path)
    if opened.config is None:
        raise LayoutError(f"{path} has no configuration; look at it with: drlora replay {path}")
    if as_json:
        result = replay(opened)
        values: dict[str, Any] = {"notes": opened.notes, "events": event_rows(result)}
        values |= {"final_ranks": result.final_ranks, "diagnosis": diagnose(opened).to_dict()}
        common.emit(values)
        return
    page = render(opened, title=f"Ranks of {run_dir.resolve().name}")
    target = output or (run_dir if path != run_dir else run_dir.parent) / "report.html"
    write_text(target, page)
    common.say(f"wrote {target}")
    common.say(str(diagnose(opened)))
