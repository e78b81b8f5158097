"""A model and a task, loaded, encoded and measured once per process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

import drlora_torch
from benchmarks.quality import evaluation
from benchmarks.quality.errors import StudyError
from benchmarks.quality.evaluation import Evaluation
from benchmarks.quality.profiling import PROFILES, Arrays
from benchmarks.quality.records import RunSpec, Training
from benchmarks.quality.rows import Row, encode


class Setting:
    """A model and the encoded rows of a task.

    Attributes:
        model: the base model; every run restores it.
        padding: padding token.
        train, validation, test: the splits; the last two are cut to ``evaluation_rows``.
        experts: number of experts over all layers.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, task: Any, training: Training) -> None:
        self.model = model
        self.padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        layers = [layer for layer in drlora_torch.discover(model) if not layer.only_on_request]
        if not layers:
            raise StudyError(f"{type(model).__name__} has no MoE layer that drlora can adapt")
        self.experts = sum(layer.num_experts for layer in layers)
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
        """A measurement of ``profiling.PROFILES`` on the base model and the training rows."""
        if signal not in self._profiles:
            measure = PROFILES[signal]
            self._profiles[signal] = measure(self.model, self.train, self._size, self.padding)
        return self._profiles[signal]


def load_setting(spec: RunSpec) -> Setting:
    """The setting of a run, cached in this process."""
    # The other fields of Training do not matter here.
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
