"""Run a study: all runs that are not in its results file yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from benchmarks.quality import results_file
from benchmarks.quality.adapting import check_kind, find_policy
from benchmarks.quality.allocation import allocator_config, training_of
from benchmarks.quality.errors import StudyError
from benchmarks.quality.expansion import report_runs, tuning_runs
from benchmarks.quality.records import RunRecord, RunSpec
from benchmarks.quality.study import Study
from benchmarks.quality.workers import Execute, Failure, pool
from drlora_core.errors import near_misses


def check(study: Study) -> None:
    """Check the study before hours of runs.

    Raises:
        ValueError: a method, a configuration, a task or a model is invalid.
    """
    from benchmarks.quality.models import SHIPPED
    from benchmarks.quality.tasks import load_task

    for model in study.models:
        if not (model in SHIPPED or "/" in model or Path(model).is_dir()):
            hint = near_misses(model, SHIPPED)
            raise StudyError(f"no model {model!r}: neither a folder nor a Hugging Face id; {hint}")
        if model in SHIPPED and not SHIPPED[model].is_dir():
            raise StudyError(f"model {model!r} is missing from {SHIPPED[model]}; use --model")

    for method in study.methods:
        check_kind(method)
        find_policy(method)
        allocator_config(method, training_of(method, study.training), seed=0)
    for task in study.tasks:
        load_task(task)


def conduct(
    study: Study,
    output: Path,
    workers: int,
    console: Console,
    execute: Execute | None = None,
    reuse: Sequence[Path] = (),
) -> list[Failure]:
    """Run everything that is neither in ``output`` nor in a file of ``reuse``.

    Args:
        study: the study.
        output: results file; runs are appended as they finish, so you can stop at any time and
            call again.
        workers: number of processes; 1 runs in this process.
        console: shows the progress.
        execute: executes one run, with one worker; default: training.
        reuse: results files of other studies; runs with the same specification count as done.

    Returns:
        The failed runs; they are not in the file.

    Raises:
        ValueError: the study or a results file is invalid.
    """
    check(study)
    if cut := results_file.mend(output):
        console.print(f"{output}: removed a cut-off last line ({cut} bytes); its run is repeated")
    files = [*reuse, output]
    done = {record.key: record for path in files for record in results_file.read(path)}
    failures: list[Failure] = []
    with pool(workers, execute) as outcomes, _progress(console) as progress:
        for title, runs in (
            ("learning rates", lambda: tuning_runs(study)),
            ("seeds", lambda: report_runs(study, done.values())),
        ):
            specs = list({spec.key: spec for spec in runs()}.values())
            failed = {failure.spec.key for failure in failures}
            waiting = [each for each in specs if each.key not in done.keys() | failed]
            bar = progress.add_task(title, total=len(specs), completed=len(specs) - len(waiting))
            for outcome in outcomes(waiting):
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    _say(progress.console, f"failed: {label(outcome.spec)}\n  {outcome.reason}")
                else:
                    results_file.append(output, outcome)
                    done[outcome.key] = outcome
                progress.advance(bar)
    wanted = {each.key for each in [*tuning_runs(study), *report_runs(study, done.values())]}
    show_budgets([record for key, record in done.items() if key in wanted], console)
    return failures


def label(spec: RunSpec) -> str:
    """Readable name of a run."""
    where = f"{spec.model} / {spec.task} / {spec.method.name}"
    return f"{where} at {spec.learning_rate:g}, seed {spec.seed}"


def show_budgets(records: Iterable[RunRecord], console: Console) -> None:
    """Print the final total rank of each method and the budget."""
    table = Table(title="Final total rank, checked in every run")
    for column in ("model", "method", "runs", "total rank", "budget", "trained parameters"):
        left = column in ("model", "method")
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.spec.model, record.spec.method.name), []).append(record)
    for (model, method), group in groups.items():
        last = group[-1]
        table.add_row(model, method, str(len(group)), *_budget(last))
    console.print(table)
    for (model, method), group in groups.items():
        if diverged := sum(record.diverged for record in group):
            _say(console, f"{model} / {method}: {diverged} of {len(group)} runs diverged")
        if group[-1].refused:
            _say(console, f"{model} / {method} was refused: {group[-1].refused}")


def _budget(record: RunRecord) -> tuple[str, str, str]:
    if record.refused:
        return "refused", str(record.budget), "-"
    over = " (upper bound)" if record.spec.method.upper_bound else ""
    return f"{record.total_rank}{over}", str(record.budget), f"{record.trained_parameters:,}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=1800.0,  # runs take seconds to minutes each
    )
