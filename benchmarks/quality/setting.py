"""What all runs on a model and a task share: loaded, encoded and measured once a process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from benchmarks.quality import evaluation
from benchmarks.quality.evaluation import Evaluation
from benchmarks.quality.profiling import PROFILES, Arrays
from benchmarks.quality.records import RunSpec, Training
from benchmarks.quality.rows import Row, encode
from drlora_torch.models.discovery import adaptable


class Setting:
    """A model and the encoded rows of a task.

    Attributes:
        model: the base model; every run leaves it as it was.
        padding: token to pad with.
        train, validation, test: the splits, the last two cut to ``evaluation_rows``.
        experts: number of experts in all layers.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, task: Any, training: Training) -> None:
        self.model = model
        self.padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.experts = sum(record.num_experts for record in adaptable(model))
        few = training.evaluation_rows
        self.train, self.validation, self.test = (
            encode(tokenizer, rows, training.max_tokens)
            for rows in (task.train, task.validation[:few], task.test[:few])
        )
        self._size = training.evaluation_batch
        self._profiles: dict[str, Arrays] = {}

    def evaluate(self, model: nn.Module, rows: Sequence[Row]) -> Evaluation:
        """Loss and exact match of a split."""
        return evaluation.evaluate(model, rows, self._size, self.padding)

    @functools.cached_property
    def start_validation(self) -> Evaluation:
        """The base model on the validation split."""
        return self.evaluate(self.model, self.validation)

    @functools.cached_property
    def start_test(self) -> Evaluation:
        """The base model on the test split."""
        return self.evaluate(self.model, self.test)

    def profile(self, signal: str) -> Arrays:
        """What ``profiling.PROFILES`` measures of the base model on the training rows."""
        if signal not in self._profiles:
            measure = PROFILES[signal]
            self._profiles[signal] = measure(self.model, self.train, self._size, self.padding)
        return self._profiles[signal]


def setting_of(spec: RunSpec) -> Setting:
    """The setting of a run, from this process's store of them."""
    # The rest of the training does not matter here.
    shared = ("device", "dtype", "max_tokens", "evaluation_rows", "evaluation_batch")
    same = Training(
        steps=1, batch_size=1, **{name: getattr(spec.training, name) for name in shared}
    )
    return _setting(spec.model, spec.task, same)


@functools.lru_cache(maxsize=16)
def _setting(model: str, task: str, training: Training) -> Setting:
    from benchmarks.quality.tasks import load_task

    loaded, tokenizer = _model(model, training.device, training.dtype)
    return Setting(loaded, tokenizer, load_task(task), training)


@functools.lru_cache(maxsize=1)
def _model(name: str, device: str, dtype: str) -> tuple[nn.Module, Any]:
    from benchmarks.quality.models import load_model

    return load_model(name, device, dtype)
