"""One run: train a method on a task, evaluate it, and leave the model as it was."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import platform
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.quality.adapting import HINDSIGHT, Adapted, RefusedError, adapted
from benchmarks.quality.allocation import allocator_config, training_of
from benchmarks.quality.errors import StudyError
from benchmarks.quality.evaluation import logits
from benchmarks.quality.methods import find_method
from benchmarks.quality.profiling import Arrays
from benchmarks.quality.records import RunRecord, RunSpec, Training
from benchmarks.quality.rows import collate, shuffled
from benchmarks.quality.setting import Setting, setting_of
from benchmarks.report import processor

HUGE = 1e9
"""Loss of a run that diverged: finite, so that every table can hold it, and worse than any."""
WARMUP = {"linear": 0.05, "slow": 0.25}
"""Share of the steps in which the learning rate rises, by schedule."""
GROWN = "early"
"""The method whose final ranks ``hindsight`` has from the start."""
PACKAGES = ("drlora", "torch", "transformers", "peft", "numpy")


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run measured."""

    curve: list[tuple[int, float]]
    """Validation loss by step, the last at the end."""
    test_loss: float
    test_exact_match: float
    diverged: bool = False


DIVERGED = Outcome([], HUGE, 0.0, diverged=True)


def run(spec: RunSpec) -> RunRecord:
    """Do one run.

    The same specification gives the same figures, and methods are paired by seed: they see the
    same batches and start from the same rows of A. The random state of the process is untouched.

    Raises:
        StudyError: the final total rank is not the budget, or names are unknown.
    """
    setting = setting_of(spec)
    start = setting.start_test.loss
    started = time.perf_counter()
    training = training_of(spec.method, spec.training)
    config = allocator_config(spec.method, training, spec.seed)
    alpha = training.alpha_per_rank * config.r_target
    # PEFT initialises from the global stream; dropout of a model would draw from it too.
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        try:
            profile = functools.partial(_profile, setting, spec)
            with adapted(spec.method, setting.model, config, alpha, profile) as subject:
                outcome = _train(subject, setting, training, spec)
                figures = _figures(subject, setting, spec, outcome)
        except RefusedError as refusal:
            figures = _refused(setting, spec, str(refusal))
    return RunRecord(
        key=spec.key,
        spec=spec,
        start_loss=start,
        seconds=time.perf_counter() - started,
        versions=versions(),
        **figures,
    )


def _profile(setting: Setting, spec: RunSpec, signal: str) -> Arrays:
    """What a static method is given before training: a measurement, or the ranks of another run."""
    if signal != HINDSIGHT:
        return setting.profile(signal)
    grown = run(spec.model_copy(update={"method": find_method(GROWN)}))
    return {name: np.array(ranks, dtype=np.float64) for name, ranks in grown.ranks.items()}


def _train(subject: Adapted, setting: Setting, training: Training, spec: RunSpec) -> Outcome:
    """Train, and measure validation loss on the way and the test split at the end."""
    optimizer = torch.optim.AdamW(
        subject.parameters,
        lr=spec.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=True,
    )
    parts = training.evaluations
    marks = {-(-training.steps * part // parts) for part in range(1, parts + 1)}
    curve = [(0, setting.start_validation.loss)]
    rows_per_step = training.batch_size * training.accumulation
    order = shuffled(len(setting.train), rows_per_step, spec.seed)
    subject.model.train()
    for step in range(1, training.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * rate(training, step)
        if not _backward(subject.model, setting, training, next(order)):
            return DIVERGED
        torch.nn.utils.clip_grad_norm_(subject.parameters, training.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step in marks:
            curve.append((step, setting.evaluate(subject.model, setting.validation).loss))
    test = setting.evaluate(subject.model, setting.test)
    if not all(math.isfinite(loss) for loss in (curve[-1][1], test.loss)):
        return DIVERGED
    return Outcome(curve, test.loss, test.exact_match)


def _backward(model: nn.Module, setting: Setting, training: Training, chosen: list[int]) -> bool:
    """Gradients of the mean over the completion tokens of all passes; False if not finite."""
    device = torch.device(training.device)
    size = training.batch_size
    batches = [
        collate([setting.train[i] for i in chosen[first : first + size]], setting.padding, device)
        for first in range(0, len(chosen), size)
    ]
    tokens = sum(batch.completion_tokens for batch in batches)
    for batch in batches:
        predicted, labels = logits(model, batch)
        loss = cross_entropy(predicted, labels, reduction="sum") / tokens
        if not torch.isfinite(loss):
            return False
        loss.backward()
    return True


def rate(training: Training, step: int) -> float:
    """Share of the learning rate at a step, counted from 1."""
    if training.schedule == "constant":
        return 1.0
    warmup = max(round(WARMUP[training.schedule] * training.steps), 1)
    return min(step / warmup, (training.steps - step + 1) / (training.steps - warmup + 1))


def _figures(subject: Adapted, setting: Setting, spec: RunSpec, outcome: Outcome) -> dict[str, Any]:
    ranks = {name: values.tolist() for name, values in subject.ranks().items()}
    total, budget = sum(map(sum, ranks.values())), setting.experts * spec.training.r_target
    if not outcome.diverged:
        check_budget(spec, total, setting.experts)
    engine = subject.engine
    names = [] if engine is None else engine.layer_names
    return {
        "validation_loss": outcome.curve[-1][1] if outcome.curve else HUGE,
        "test_loss": outcome.test_loss,
        "test_exact_match": outcome.test_exact_match,
        "curve": outcome.curve,
        "diverged": outcome.diverged,
        "total_rank": total,
        "budget": budget,
        "trained_parameters": subject.trained(),
        "ranks": ranks,
        "routing": {name: _rounded(engine.routing_frequency(name)) for name in names},
        "importance": {name: _rounded(engine.rank_importance(name)) for name in names},
    }


def _rounded(values: np.ndarray) -> list[float]:
    """Four digits are enough to look at, and results files are kept."""
    return [float(f"{value:.4g}") for value in values]


def check_budget(spec: RunSpec, total: int, experts: int) -> None:
    """Refuse a run that was not given what it is compared at.

    Raises:
        StudyError: the total rank is neither the budget nor, for an upper bound, r_max everywhere.
    """
    training, method = spec.training, spec.method
    per_expert = training.r_max if method.upper_bound else training.r_target
    if total != experts * per_expert:
        raise StudyError(
            f"method {method.name!r} ended at a total rank of {total}, not {experts} experts x "
            f"{per_expert} = {experts * per_expert}: it cannot be compared"
        )


def _refused(setting: Setting, spec: RunSpec, reason: str) -> dict[str, Any]:
    return {
        "validation_loss": 0.0,
        "test_loss": 0.0,
        "test_exact_match": 0.0,
        "curve": [],
        "total_rank": 0,
        "budget": setting.experts * spec.training.r_target,
        "trained_parameters": 0,
        "ranks": {},
        "routing": {},
        "importance": {},
        "refused": reason,
    }


@functools.cache
def versions() -> dict[str, str]:
    """What the figures and seconds depend on besides the specification."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    hardware = {"processor": processor(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        hardware["accelerator"] = torch.cuda.get_device_name()
    return {"python": platform.python_version(), **installed, **hardware}
