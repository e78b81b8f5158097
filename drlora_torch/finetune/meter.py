"""Measure one training of this process: seconds, tokens, peak memory."""

from __future__ import annotations

import contextlib
import gc
import re
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

MIB = 2**20
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory since this object was made.

    With a GPU it is the memory that torch allocated there. Otherwise it is the resident memory of
    the process; only Linux can reset its peak, so elsewhere it is the largest of the samples.

    Attributes:
        source: ``GPU``, ``process`` or ``process, sampled``.
    """

    def __init__(self) -> None:
        gc.collect()  # frees what an earlier training left behind
        self._sampled = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.source = "GPU"
            return
        self.source = "process, sampled"
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)
            self.source = "process"
        self.sample()

    def sample(self) -> None:
        """Take a sample, where the peak cannot be reset."""
        if self.source == "process, sampled":
            self._sampled = max(self._sampled, psutil.Process().memory_info().rss)

    def mebibytes(self) -> float:
        """Return the peak in MiB."""
        if self.source == "GPU":
            return torch.cuda.max_memory_allocated() / MIB
        self.sample()
        if self.source == "process":
            match = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
            assert match is not None
            return int(match[1]) / 1024
        return self._sampled / MIB


class Meter(TrainerCallback):
    """Measures a training from its first step in this process to its last.

    What an earlier process did before a resume counts neither as tokens nor as seconds.
    """

    tokens = 0
    """Input tokens, without padding."""
    seconds = 0.0
    peak_memory_mb: float | None = None
    """In MiB; None before the end of a training."""
    memory_source: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start; the Trainer has loaded its checkpoint by now."""
        self._memory = PeakMemory()
        self._tokens = state.num_input_tokens_seen
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample the memory."""
        self._memory.sample()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self._started
        self.tokens = state.num_input_tokens_seen - self._tokens
        self.peak_memory_mb = self._memory.mebibytes()
        self.memory_source = self._memory.source
