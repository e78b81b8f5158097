"""``drlora evaluate``: held-out loss, exact match and harness tasks of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from drlora_core.cli.common import AsJson, emit
from drlora_core.cli.console import make_console, say
from drlora_core.cli.tables import show_table

Run = Annotated[Path, typer.Argument(help="Folder of a run of drlora finetune.")]
Data = Annotated[
    str | None,
    typer.Argument(
        help="Rows to evaluate on, as in drlora finetune: their validation or test split, or else "
        "all of them. If not given, the rows that the run held out."
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(help="Which columns to read, FIELD=COLUMN,... If not given, as the run."),
]
ExactMatch = Annotated[
    bool,
    typer.Option(
        "--exact-match",
        help="Also let the model answer, with the likeliest token each time, and count the answers "
        "that are the right ones word by word.",
    ),
]
Base = Annotated[bool, typer.Option("--base", help="Evaluate the base model too, to compare.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks of lm-eval (pip install lm-eval), such as gsm8k,arc_easy; without DATA, only "
        "these."
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Rows of a forward pass. If not given, as the run.")
]
Limit = Annotated[
    int | None, typer.Option(help="Evaluate on the first rows only, of each task too.")
]


def evaluate(
    run: Run,
    data: Data = None,
    columns: Columns = None,
    exact_match: ExactMatch = False,
    base: Base = False,
    tasks: Tasks = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a run has trained: loss in nats per token, perplexity, exact match.

    Tokens that bear loss are those of the training, and the loss is the mean over all of them,
    whatever --batch-size. The adapter of an unfinished run is that of its last checkpoint.
    """
    from drlora_torch.finetune.after.evaluation import Wanted, evaluate_run
    from drlora_torch.finetune.watch.progress import quiet_libraries

    wanted = Wanted(
        data=data,
        columns=columns,
        exact_match=exact_match,
        base=base,
        tasks=tasks,  # type: ignore[arg-type]  # its parser takes a,b
        batch_size=batch_size,
        limit=limit,
    )
    with quiet_libraries():
        report = evaluate_run(run, wanted, make_console(stderr=True))
    if as_json:
        emit(report.model_dump())
        return
    if report.scores:
        where = report.data or "rows that the run held out"
        asked = f", {report.questions:,} questions" if exact_match else ""
        say(f"{where}: {report.rows:,} rows, {report.tokens:,} tokens that bear loss{asked}")
    rows = [
        {"model": name, "loss": f"{scores.loss:.4f}", "perplexity": scores.perplexity}
        | ({"exact match": scores.exact_match} if exact_match else {})
        for name, scores in report.scores.items()
    ]
    show_table("Evaluation", rows, figures=["loss"])
    _show_tasks(report.tasks)


def _show_tasks(tasks: dict[str, dict[str, dict[str, float]]]) -> None:
    rows: list[dict[str, Any]] = [
        {"task": task, "metric": metric.removesuffix(",none"), "model": name, "value": value}
        for name, found in tasks.items()
        for task, metrics in found.items()
        for metric, value in metrics.items()
    ]
    show_table("lm-eval", rows)
