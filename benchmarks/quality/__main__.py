"""``python -m benchmarks.quality``: run a study, and report on its results."""

# typer reads these annotations at run time, where Python 3.10 wants Optional.
# ruff: noqa: UP045

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from typer import Argument, Option

from benchmarks.quality import study as studies
from benchmarks.quality.errors import StudyError
from benchmarks.quality.methods import find_method
from benchmarks.quality.report import report

RESULTS = Path(__file__).parent / "results"
SHOWN = ("Method", "Test loss", "Minus uniform", "Exact match", "Learning rate", "Total rank")

Profile = Annotated[
    str,
    Argument(
        help=f"One of {', '.join(sorted(p.stem for p in studies.PROFILES.glob('*.toml')))}, "
        "or the path of a study file."
    ),
]
Models = Annotated[
    Optional[list[str]],
    Option("--model", help="Hugging Face id or folder, instead of the profile's; repeatable."),
]
Tasks = Annotated[
    Optional[list[str]],
    Option("--task", help="Task or .jsonl file, instead of the profile's; repeatable."),
]
Methods = Annotated[
    Optional[list[str]],
    Option("--method", help="Run only this method; repeatable."),
]
Seeds = Annotated[Optional[str], Option(help="Reported seeds, e.g. 0,1,2.")]
Device = Annotated[Optional[str], Option(help="cpu, cuda, cuda:1 ...")]
Workers = Annotated[
    Optional[int],
    Option(min=1, help="Processes (default: one per core on CPU, otherwise 1)."),
]
Output = Annotated[
    Optional[Path],
    Option(help="Results file (default: benchmarks/quality/results/PROFILE.jsonl)."),
]
Reuse = Annotated[
    Optional[list[Path]],
    Option(
        exists=True,
        help="Results file of another study; runs that are the same are not run again. Repeatable.",
    ),
]
DryRun = Annotated[bool, Option("--dry-run", help="Check the study and count its runs.")]

app = typer.Typer(
    help="Measure the claims of DR-LoRA: methods x tasks x seeds x learning rates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None: ...


@app.command()
def run(
    profile: Profile,
    model: Models = None,
    task: Tasks = None,
    method: Methods = None,
    seeds: Seeds = None,
    device: Device = None,
    workers: Workers = None,
    output: Output = None,
    reuse: Reuse = None,
    dry_run: DryRun = False,
) -> None:
    """Run what is missing of a study; you can stop it at any time and run it again."""
    # SIGTERM acts like Ctrl-C: worker processes end, and finished runs are already on disk.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        study = _with_options(
            studies.load(studies.find_profile(profile)), model, task, method, seeds, device
        )
        output = output or RESULTS / f"{study.name}.jsonl"
        failures = _run_study(study, output, reuse or [], workers, dry_run)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("stopped; finished runs are kept, the same command continues", err=True)
        raise typer.Exit(130) from None
    if failures:
        many = "1 run" if failures == 1 else f"{failures} runs"
        typer.echo(f"{many} failed, see above; the same command runs them again", err=True)
        raise typer.Exit(1)


def _run_study(
    study: studies.Study, output: Path, reuse: list[Path], workers: int | None, dry_run: bool
) -> int:
    """Run the study; return the number of failed runs."""
    from benchmarks.quality.expansion import size
    from benchmarks.quality.runner import check, conduct

    console = Console()
    console.print(f"{study.name}: {study.description}", markup=False, highlight=False)
    console.print(f"{size(study)} runs, to {output}", markup=False, soft_wrap=True)
    if dry_run:
        check(study)
        return 0
    if workers is None:
        workers = (os.cpu_count() or 1) if study.training.device == "cpu" else 1
    failures = conduct(study, output, workers, console, reuse=reuse)
    _compare(study, [path for path in (output, *reuse) if path.exists()])
    return len(failures)


def _compare(study: studies.Study, files: list[Path]) -> None:
    """Print a table of the methods for every model and task of the study."""
    from benchmarks.quality import runs, tables, terminal

    found = runs.read(files)
    for setting in found.settings():
        if (setting.model, setting.task) in itertools.product(study.models, study.tasks) and (
            setting.training == study.training
        ):
            rows = [{name: row[name] for name in SHOWN} for row in tables.methods(found, setting)]
            terminal.print_table(found.label(setting), rows)


def _with_options(
    study: studies.Study,
    model: list[str] | None,
    task: list[str] | None,
    method: list[str] | None,
    seeds: str | None,
    device: str | None,
) -> studies.Study:
    """Apply the options of the command line to the study."""
    changes: dict[str, Any] = {}
    if model:
        changes["models"] = tuple(model)
    if task:
        changes["tasks"] = tuple(task)
    if method:
        own = {each.name: each for each in study.methods}
        changes["methods"] = tuple(own.get(name) or find_method(name) for name in method)
    if seeds:
        changes["seeds"] = _numbers(seeds)
    if device:
        changes["training"] = study.training.model_copy(update={"device": device})
    return study.model_copy(update=changes)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise StudyError(
            f"--seeds takes comma-separated whole numbers, e.g. 0,1,2; got {text!r}"
        ) from None


app.command()(report)

if __name__ == "__main__":
    app()
