"""``drlora report``: an HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from drlora_core.atomic import write_text
from drlora_core.cli import common
from drlora_core.cli.console import say
from drlora_core.diagnostics import diagnose
from drlora_core.errors import DRLoRAError
from drlora_core.report import event_rows, write_report
from drlora_core.report.serving import LivePage, is_awaited, make_server
from drlora_core.runs import Run, open_run


def report(
    run_dir: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A run's folder with a recording, the recording, or a routing trace (.npz).",
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another run, recording or trace of the same layers, to compare ranks and loss "
            "with."
        ),
    ] = None,
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
    watch: Annotated[
        bool,
        typer.Option(
            help="Serve the page on this machine and refresh it while the run goes on; Ctrl-C ends."
        ),
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port for --watch; 0: any that is free.")
    ] = 0,
) -> None:
    """Write an HTML page about a run.

    The page needs no other file and no network: loss, ranks, events, what was checked,
    configuration, and the command that repeats the run. A trace or a profile has no configuration:
    its page shows ten events spread over its steps.
    """
    _check_options(against, output, as_json, watch)
    if watch:
        _serve(run_dir, against, port)
        return
    if output is not None:
        common.check_output(output)
    run, other = open_run(run_dir), None if against is None else open_run(against)
    if as_json:
        _write_json(run, output)
        return
    say(f"wrote {write_report(run, output, other)}")
    say(str(diagnose(run)))


def _check_options(against: Path | None, output: Path | None, as_json: bool, watch: bool) -> None:
    if as_json and against is not None:
        raise DRLoRAError("--json with --against: use drlora replay RUN --against OTHER --json")
    if watch and (as_json or output is not None):
        word = "--json" if as_json else "--output"
        raise DRLoRAError(f"--watch serves a page and writes none; leave out {word}")


def _serve(path: Path, against: Path | None, port: int) -> None:
    if not path.exists():
        raise DRLoRAError(f"there is no run at {str(path)!r}; start it, then watch it")
    for each in (path, against):
        if each is not None and not is_awaited(each):
            open_run(each)  # what is wrong with it is said here
    with make_server(LivePage(path, against), port) as server:
        say(f"http://127.0.0.1:{server.server_address[1]}/ shows {path}; Ctrl-C ends")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")


def _write_json(run: Run, output: Path | None) -> None:
    final = {name: run.final[part] for name, part in run.places.items()}
    values: dict[str, Any] = {"notes": run.recording.notes, "events": event_rows(run)}
    values |= {"final_ranks": final, "diagnosis": diagnose(run).to_dict()}
    if output is None:
        common.emit(values)
    else:
        write_text(output, common.to_json(values) + "\n")
        say(f"wrote {output}")
