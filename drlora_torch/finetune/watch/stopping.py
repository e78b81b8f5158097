"""Ends a run that is told to stop, or that has diverged, with its last good checkpoint kept."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from drlora_core.cli import signals
from drlora_torch.errors import RunError

SIGNALS = (signal.SIGINT, *signals.SIGNALS)
IMPATIENT_AFTER = 1.0
"""Seconds; a launcher passes on a signal that its processes have had from the terminal too."""


class Diverged(RunError):
    """A loss is not finite: what was learned after the last checkpoint is lost."""

    exit_code = 1


class Stopped(RunError):
    """The run was told to stop, and has written a checkpoint."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


class StopOnSignal(TrainerCallback):
    """Ends the training after the current step: on Ctrl-C, SIGTERM, or a terminal that is closed.

    All processes of a run stop after the same step. Another signal, a second later, ends at once.

    Args:
        processes: those that train together.
        device: on which they exchange what they have received.
    """

    def __init__(self, processes: int, device: torch.device) -> None:
        self._processes, self._device = processes, device
        self._received: int = 0
        self._moment = 0.0
        self._terminals: list[int] = []
        self.began = False
        """True once a training has begun."""
        self.step: int | None = None
        """The step after which the training ended; None if it was not in a training."""

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals only ask to stop; in threads other than the main one, as before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._terminals = [handle for handle in (1, 2) if os.isatty(handle)]
        heard = [number for number in SIGNALS if not signals.is_ignored(number)]
        before = {number: signal.signal(number, self._receive) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._moment = number, time.monotonic()
            if signal.Signals(number).name == "SIGHUP":
                self._leave_terminal()
        elif time.monotonic() - self._moment > IMPATIENT_AFTER:
            raise SystemExit(128 + number)

    def _leave_terminal(self) -> None:
        """Write to nowhere from now on: writing to a closed terminal would end the run at once."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in self._terminals:
            os.dup2(nowhere, handle)
        os.close(nowhere)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._processes > 1:
            self._received = self._agree()
        if self._received:
            self.step = state.global_step
            control.should_save = control.should_training_stop = True

    def _agree(self) -> int:
        received = torch.tensor(self._received, device=self._device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return int(received)

    def check(self, go_on: str) -> None:
        """Raise if a signal has come.

        Raises:
            Stopped: names the command that goes on.
        """
        if self._received:
            name = signal.Signals(self._received).name
            where = "before the first step" if self.step is None else f"after step {self.step}"
            raise Stopped(f"stopped by {name} {where}; go on with: {go_on}", self._received)


class StopWhenDeleted(TrainerCallback):
    """Ends a run whose folder is gone, before anything else is written there.

    Args:
        check: raises if it is.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check()


class StopWhenDiverged(TrainerCallback):
    """Ends a run whose loss is not finite, before a checkpoint of it is written."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        for name in ("loss", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise Diverged(
                    f"{name} is {value} at step {state.global_step}: the training has diverged; "
                    "the last checkpoint is kept. Start again with a lower --learning-rate, or "
                    "--max-grad-norm"
                )
