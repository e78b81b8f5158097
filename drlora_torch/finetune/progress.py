"""The progress bar of a run: step, loss and active rank."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback


class RichProgress(TrainerCallback):
    """One line that says how far the training is and what it has come to.

    Where there is no terminal a line is printed every tenth of the run instead.
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
        """Take loss and rank from what the Trainer logs at every step."""
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
        """Stop drawing; harmless if already stopped."""
        with contextlib.suppress(Exception):
            self._progress.stop()


def silence(trainer: Trainer) -> None:
    """Take the Trainer's own printing away; ours says it."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
