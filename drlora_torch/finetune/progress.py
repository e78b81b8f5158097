"""Output of a run while it trains."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

# Errors of `datasets` reach us as exceptions, which we report ourselves.
LEVELS = {"trl": logging.ERROR, "accelerate": logging.ERROR, "datasets": logging.CRITICAL}


class RichProgress(TrainerCallback):
    """Progress bar with the step, the loss and the total rank.

    Without a terminal it prints a line after each tenth of the steps instead.
    """

    def __init__(self, label: str, console: Console) -> None:
        self._console = console
        self._label = label
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  rank {task.fields[rank]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(label, total=None, loss="-", rank="-")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self._progress.start()
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the loss and rank that the Trainer logs at every step."""
        if not logs or "loss" not in logs:
            return
        loss, rank = f"{float(logs['loss']):.4f}", str(logs.get("total_rank", "-"))
        self._progress.update(self._task, completed=state.global_step, loss=loss, rank=rank)
        every = max(state.max_steps // 10, 1)
        if not self._console.is_terminal and state.global_step % every == 0:
            self._console.print(
                f"{self._label}: step {state.global_step}/{state.max_steps}  "
                f"loss {loss}  rank {rank}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    def close(self) -> None:
        """Stop drawing, also after an error; a second call does nothing."""
        self._progress.stop()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' progress bars and notices; errors still show."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    levels = {name: logging.getLogger(name).level for name in LEVELS}
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()
