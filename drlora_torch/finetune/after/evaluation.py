"""Evaluate a trained model, and its base model beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from rich.progress import Progress

from drlora_core.cli.console import say
from drlora_core.validation import reword_errors
from drlora_torch.finetune.after.found import (
    adapter_of,
    read_options,
    trained_columns,
)
from drlora_torch.finetune.after.harness import check_tasks, run_tasks
from drlora_torch.finetune.after.held_out import (
    HeldOut,
    Question,
    questions,
    read_other,
    read_own,
)
from drlora_torch.finetune.after.opened import Opened, open_run, open_tokenizer
from drlora_torch.finetune.after.prompts import Prompter
from drlora_torch.finetune.after.scores import measure_loss, measure_matches
from drlora_torch.finetune.groups import Names
from drlora_torch.finetune.options import FinetuneOptions


class Wanted(BaseModel):
    """What to evaluate, and on what.

    Raises:
        pydantic.ValidationError: a value out of range, or options that do not go together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | None = None
    """Other rows than those that the run held out."""
    columns: str | None = None
    """Which of its columns to read."""
    exact_match: bool = False
    """Compare answers too."""
    base: bool = False
    """Evaluate the base model too."""
    tasks: Names | None = None
    """Of lm-eval; without ``data``, only these."""
    batch_size: int | None = Field(None, ge=1)
    """Rows of a forward pass; None: as the run."""
    limit: int | None = Field(None, ge=1)
    """Only the first rows, of each task too."""

    @model_validator(mode="after")
    def _check(self) -> Wanted:
        if self.columns is not None and self.data is None:
            raise ValueError("--columns needs DATA: the run knows those of its own")
        return self

    _reword_errors = model_validator(mode="wrap")(reword_errors)

    @property
    def rows(self) -> bool:
        """True if rows are evaluated, and not tasks alone."""
        return self.tasks is None or self.data is not None or self.exact_match


class Scores(BaseModel):
    """Figures of one model on rows."""

    model_config = ConfigDict(frozen=True)

    loss: float
    """Held-out loss in nats per token."""
    perplexity: float
    """Its exponential."""
    exact_match: float | None = None
    """Share of the answers that the model gives word by word."""


class Report(BaseModel):
    """Figures of the trained model, and of its base model where it was asked for."""

    data: str | None = None
    """Where the rows are from; None for those that the run held out."""
    rows: int = 0
    tokens: int = 0
    """Tokens that bear loss."""
    questions: int = 0
    """Prompts whose answers were compared for ``exact_match``."""
    scores: dict[str, Scores] = {}
    """By model: ``base`` and ``trained``."""
    tasks: dict[str, dict[str, dict[str, float]]] = {}
    """Metrics by model and task."""


class _Rows(NamedTuple):
    held_out: HeldOut
    asked: list[Question] | None


def evaluate_run(run: Path, wanted: Wanted, console: Console) -> Report:
    """Evaluate a run, or its last checkpoint.

    Args:
        run: the folder that ``drlora finetune`` wrote.
        wanted: what to evaluate.
        console: shows progress.

    Raises:
        DRLoRAError: the run, the data or a task cannot be used; found before the model is loaded,
            where that can be known.
    """
    options = read_options(run)
    adapter_of(run)
    if wanted.tasks:
        check_tasks(wanted.tasks)
    tokenizer = open_tokenizer(options)
    with console.status("reading the data"):
        rows = _read(run, options, tokenizer, wanted, console) if wanted.rows else None
    with console.status("loading the model"):
        opened = open_run(run, tokenizer=tokenizer, on_gpu=True)
    prompter = Prompter(tokenizer, trained_columns(run), chat=_chat(run, rows, wanted, console))
    batch_size = wanted.batch_size or options.batch_size
    report = Report(data=wanted.data)
    for name in _of_each(opened, wanted.base):
        if rows is not None:
            stop = prompter.stop_tokens(opened.model)
            report.scores[name] = _score(opened, rows, stop, batch_size, console)
        if wanted.tasks:
            report.tasks[name] = run_tasks(
                opened.model,
                tokenizer,
                wanted.tasks,
                batch_size=batch_size,
                limit=wanted.limit,
                chat=prompter.chat,
            )
    if rows is not None:
        report.rows, report.tokens = len(rows.held_out.rows), rows.held_out.loss_tokens
        report.questions = len(rows.asked or ())
    return report


def _chat(run: Path, rows: _Rows | None, wanted: Wanted, console: Console) -> bool | None:
    """True to use the chat template, False to do without; None: as the run was trained."""
    if rows is not None and rows.held_out.examples.needs_template:
        return True
    if trained_columns(run):
        return None
    if wanted.tasks:
        text = f"{str(run)!r} does not tell how its prompts were made: tasks get no chat template"
        say(text, console)
    return False


def _read(
    run: Path, options: FinetuneOptions, tokenizer: object, wanted: Wanted, console: Console
) -> _Rows:
    if wanted.data is None:
        held_out = read_own(run, tokenizer, console)
    else:
        held_out = read_other(options, tokenizer, wanted.data, wanted.columns)
    if wanted.limit is not None:
        held_out = held_out.first(wanted.limit)
    return _Rows(held_out, questions(held_out, tokenizer) if wanted.exact_match else None)


def _of_each(opened: Opened, base: bool) -> Iterator[str]:
    """Yield ``base``, if it is wanted, and ``trained``: which one the model is until the next."""
    if base:
        with opened.adapter.disabled():
            yield "base"
    yield "trained"


def _score(
    opened: Opened, rows: _Rows, stop: list[int], batch_size: int, console: Console
) -> Scores:
    model, (held_out, asked) = opened.model, rows
    with _progress(console, "held-out loss", len(held_out.rows)) as done:
        loss = measure_loss(model, held_out.rows, batch_size, done)
    scores = Scores(loss=loss.mean, perplexity=loss.perplexity)
    if asked is None:
        return scores
    with _progress(console, "exact match", len(asked)) as done:
        right = measure_matches(model, opened.tokenizer, asked, stop, batch_size, done)
    return scores.model_copy(update={"exact_match": right / len(asked)})


@contextlib.contextmanager
def _progress(console: Console, what: str, rows: int) -> Iterator[Callable[[int], None]]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=rows)
        yield lambda number: bar.advance(task, number)
