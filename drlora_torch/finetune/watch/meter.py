"""Measure one training of this process: seconds, tokens, peak memory."""

from __future__ import annotations

import contextlib
import gc
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback


class Meter(TrainerCallback):
    """Measures a training from its first step in this process to its last.

    Its public attributes are fields of :class:`~drlora_torch.finetune.result.RunResult`, and the
    input tokens without padding. Evaluations and checkpoints do not count, and neither does what an
    earlier process did before a resume. Peak memory is that of the GPU; without one, of the
    process, as Linux keeps it, or the largest of the samples after each step.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.peak_memory_mb: float | None = None
        self._seen = self._tokens = 0
        self._mark = time.perf_counter()
        self.memory_source = "GPU" if torch.cuda.is_available() else "process, sampled"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()  # frees what an earlier training left behind
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak of getrusage(2)
                self.memory_source = "process"
        self._seen = self._tokens = state.num_input_tokens_seen
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.memory_source == "GPU":
            memory = torch.cuda.max_memory_allocated()
        elif self.memory_source == "process":
            import resource  # not on Windows

            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        else:
            memory = psutil.Process().memory_info().rss
        self.peak_memory_mb = max(self.peak_memory_mb or 0.0, memory / 2**20)
        self._seen = state.num_input_tokens_seen
        self.tokens = self._seen - self._tokens
        self._take_time()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def _take_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the training so far; None before its first step has ended."""
        return self.tokens / self.seconds if self.tokens else None
