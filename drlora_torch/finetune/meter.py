"""Measure one training of this process: seconds, tokens, peak memory."""

from __future__ import annotations

import gc
import time
from typing import Any

import psutil
import torch
from transformers import TrainerCallback


class Meter(TrainerCallback):
    """Measures a training from its first step in this process to its last.

    Its attributes are fields of :class:`~drlora_torch.finetune.result.RunResult`, and the input
    tokens without padding. What an earlier process did before a resume does not count.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.peak_memory_mb: float | None = None
        self.memory_source = "GPU" if torch.cuda.is_available() else "process, sampled"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()  # frees what an earlier training left behind
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._tokens = state.num_input_tokens_seen
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = psutil.Process().memory_info().rss
        self.peak_memory_mb = max(self.peak_memory_mb or 0.0, memory / 2**20)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._started
        self.tokens = state.num_input_tokens_seen - self._tokens
