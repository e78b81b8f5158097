"""``drlora report``: an HTML page about a recorded run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from drlora_core.atomic import write_text
from drlora_core.cli import common
from drlora_core.cli.console import say
from drlora_core.config import AllocatorConfig
from drlora_core.diagnostics import diagnose
from drlora_core.recording import Recording
from drlora_core.replay import replay
from drlora_core.report import event_rows, render


def report(
    run_dir: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A run's folder with a recording, the recording, or a routing trace (.npz).",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write, which must not exist. [default: report.html in RUN, which is "
            "replaced; with --json, standard output]",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Events, ranks and findings as JSON instead of a page.")
    ] = False,
) -> None:
    """Write an HTML page about a recorded run.

    The page needs no other file: events, rank maps and trajectories, diagnostics. A trace or a
    profile has no configuration: its page shows ten events spread over its steps.
    """
    path = common.find_recording(run_dir)
    if output is not None:
        common.check_output(output)
    opened = common.open_recording(path)
    config = opened.config or AllocatorConfig.model_validate(common.ten_events(opened.steps))
    if as_json:
        _write_json(opened, config, output)
        return
    page = render(opened, config, title=f"Ranks of {run_dir.resolve().name}")
    target = output or (run_dir if path != run_dir else run_dir.parent) / "report.html"
    write_text(target, page)
    say(f"wrote {target}")
    say(str(diagnose(opened, config)))


def _write_json(opened: Recording, config: AllocatorConfig, output: Path | None) -> None:
    result = replay(opened, config)
    values: dict[str, Any] = {"notes": opened.notes, "events": event_rows(result)}
    values |= {"final_ranks": result.final_ranks, "diagnosis": diagnose(opened, config).to_dict()}
    if output is None:
        common.emit(values)
    else:
        write_text(output, common.to_json(values) + "\n")
        say(f"wrote {output}")
