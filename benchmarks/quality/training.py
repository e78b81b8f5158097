"""One run: train a method on a task and evaluate it; the base model is restored."""

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
from benchmarks.quality.effective_rank import effective_ranks
from benchmarks.quality.errors import StudyError
from benchmarks.quality.evaluation import logits
from benchmarks.quality.methods import find_method
from benchmarks.quality.profiling import Arrays
from benchmarks.quality.records import RunRecord, RunSpec, Training
from benchmarks.quality.rows import collate, shuffled
from benchmarks.quality.setting import Setting, load_setting
from benchmarks.report import processor

HUGE = 1e9
"""Loss of diverged runs: finite, and larger than any other."""
WARMUP = {"linear": 0.05, "slow": 0.25}
"""Share of warmup steps, by schedule."""
GROWN = "early"
"""``hindsight`` starts with the final ranks of this method."""
PACKAGES = ("drlora", "torch", "transformers", "peft", "numpy")


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Results of a run."""

    curve: list[tuple[int, float]]
    """(step, validation loss)."""
    test_loss: float
    test_exact_match: float
    diverged: bool = False


DIVERGED = Outcome([], HUGE, 0.0, diverged=True)


def run(spec: RunSpec) -> RunRecord:
    """Execute one run.

    Deterministic. Runs with the same seed see the same batches and start from the same A, whatever
    the method. The global random state does not change.

    Raises:
        StudyError: the final total rank is not the budget, or a name is unknown.
    """
    setting = load_setting(spec)
    start = setting.start_test.loss
    started = time.perf_counter()
    training = training_of(spec.method, spec.training)
    config = allocator_config(spec.method, training, spec.seed)
    alpha = training.alpha_per_rank * config.r_target
    # PEFT and dropout draw from the global generator.
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
    """The signal of a method with fixed ranks: a measurement, or the ranks of another run."""
    if signal != HINDSIGHT:
        return setting.profile(signal)
    grown = _final_ranks(spec.model_copy(update={"method": find_method(GROWN)}).model_dump_json())
    return {name: np.array(ranks) for name, ranks in grown.items()}


@functools.lru_cache(maxsize=64)
def _final_ranks(spec: str) -> dict[str, list[int]]:
    """Final ranks of a run, given its specification in JSON; several methods start from them."""
    return run(RunSpec.model_validate_json(spec)).ranks


def _train(subject: Adapted, setting: Setting, training: Training, spec: RunSpec) -> Outcome:
    """Train; evaluate on the validation split on the way, and on the test split at the end."""
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
        with subject.around_step(optimizer):
            optimizer.step()
        optimizer.zero_grad()
        if step in marks:
            curve.append((step, setting.evaluate(subject.model, setting.validation).loss))
    test = setting.evaluate(subject.model, setting.test)
    if not all(math.isfinite(loss) for loss in (curve[-1][1], test.loss)):
        return DIVERGED
    return Outcome(curve, test.loss, test.exact_match)


def _backward(model: nn.Module, setting: Setting, training: Training, chosen: list[int]) -> bool:
    """Accumulate the gradient of the mean loss per token; False if the loss is not finite."""
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
    """Factor of the learning rate at a step, counted from 1."""
    if training.schedule == "constant":
        return 1.0
    warmup = max(round(WARMUP[training.schedule] * training.steps), 1)
    return min(step / warmup, (training.steps - step + 1) / (training.steps - warmup + 1))


def _figures(subject: Adapted, setting: Setting, spec: RunSpec, outcome: Outcome) -> dict[str, Any]:
    ranks = {name: values.tolist() for name, values in subject.ranks().items()}
    total, budget = sum(map(sum, ranks.values())), setting.experts * spec.training.r_target
    if not outcome.diverged:
        check_budget(spec, total, setting.experts)
    engine = None if subject.adapter is None else subject.adapter.engine
    names = [] if engine is None else engine.layer_names
    effective = {} if subject.adapter is None else effective_ranks(subject.adapter)
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
        "effective_ranks": {name: _rounded(values) for name, values in effective.items()},
    }


def _rounded(values: np.ndarray) -> list[float]:
    """Four digits, to keep results files small."""
    return [float(f"{value:.4g}") for value in values]


def check_budget(spec: RunSpec, total: int, experts: int) -> None:
    """Check that a run ended at the budget, or with r_max everywhere for an upper bound.

    Raises:
        StudyError: it did not.
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
    """Versions of packages and hardware."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    hardware = {"processor": processor(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        hardware["accelerator"] = torch.cuda.get_device_name()
    return {"python": platform.python_version(), **installed, **hardware}
