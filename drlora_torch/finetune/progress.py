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

LEVELS = {
    "transformers": logging.ERROR,
    "trl": logging.ERROR,
    "accelerate": logging.ERROR,
    "datasets": logging.CRITICAL,  # its errors are exceptions, which we report
}


class RichProgress(TrainerCallback):
    """Shows the step, the loss and the total rank.

    On a terminal they stand in a bar, which is drawn inside ``with progress.bar``. Elsewhere a
    line is printed after each tenth of the steps.
    """

    def __init__(self, label: str, steps: int, console: Console) -> None:
        self._label = label
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  rank {task.fields[rank]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.bar.add_task(label, total=steps, loss="-", rank="-")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        step, loss, rank = state.global_step, f"{float(logs['loss']):.4f}", logs["total_rank"]
        self.bar.update(self._task, completed=step, loss=loss, rank=rank)
        if self.bar.disable and step % max(state.max_steps // 10, 1) == 0:
            line = f"{self._label}: step {step}/{state.max_steps}  loss {loss}  rank {rank}"
            self.bar.console.print(line)


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
