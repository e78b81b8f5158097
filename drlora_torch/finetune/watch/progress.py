"""Output of a run while it trains."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from drlora_torch.finetune.watch.meter import Meter

LEVELS = {
    "transformers": logging.ERROR,
    "trl": logging.ERROR,
    "accelerate": logging.ERROR,
    "peft": logging.ERROR,
    "datasets": logging.CRITICAL,  # its errors are exceptions, which we report
}


WIDE = 100
"""Columns that all figures and the bar take; on fewer, there are loss, rank and time."""


class RichProgress(TrainerCallback):
    """Shows step, loss, total rank, speed, memory, skipped steps and the time left.

    On a terminal they stand in a bar, which is drawn inside ``with progress.bar``. Elsewhere a
    line is printed after each tenth of the steps.
    """

    def __init__(self, label: str, steps: int, console: Console, meter: Meter) -> None:
        self._label, self._meter = label, meter
        self._narrow = console.is_terminal and console.width < WIDE
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            *([] if self._narrow else [BarColumn(bar_width=20)]),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.bar.add_task(label, total=steps, figures="")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        step, figures = state.global_step, self._figures(logs)
        self.bar.update(self._task, completed=step, figures=figures)
        if self.bar.disable and step % max(state.max_steps // 10, 1) == 0:
            self.bar.console.print(
                f"{self._label}: step {step}/{state.max_steps}  {figures}", soft_wrap=True
            )

    def _figures(self, logs: dict[str, Any]) -> str:
        figures = [f"loss {float(logs['loss']):.4f}", f"rank {logs['total_rank']}"]
        if logs["skipped_steps"]:
            figures.append(f"{logs['skipped_steps']} steps skipped")
        if self._narrow:
            return "  ".join(figures)
        if (speed := self._meter.tokens_per_second) is not None:
            figures.append(f"{speed:,.0f} tokens/s")
        if (memory := self._meter.peak_memory_mb) is not None:
            figures.append(f"{memory / 1024:.1f} GiB")
        return "  ".join(figures)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' progress bars and notices; errors still show."""
    before = {name: logging.getLogger(name).level for name in LEVELS}
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            for name, level in LEVELS.items():
                logging.getLogger(name).setLevel(level)
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()
