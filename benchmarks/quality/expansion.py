"""The runs of a study: every learning rate on the tuning seeds, then the best one on all seeds."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.quality.records import Method, RunRecord, RunSpec
from benchmarks.quality.study import Study


def specification(
    study: Study, model: str, task: str, method: Method, learning_rate: float, seed: int
) -> RunSpec:
    """One run of a study."""
    return RunSpec(
        model=model,
        task=task,
        method=method,
        learning_rate=learning_rate,
        seed=seed,
        training=study.training,
    )


def tuning_runs(study: Study) -> list[RunSpec]:
    """Stage 1: every learning rate on the tuning seeds. The seed is the outer loop."""
    return [
        specification(study, model, task, method, learning_rate, seed)
        for seed in study.tuning_seeds
        for model in study.models
        for task in study.tasks
        for method in study.methods
        for learning_rate in study.learning_rates
    ]


def report_runs(study: Study, done: Iterable[RunRecord]) -> list[RunSpec]:
    """Stage 2: the best rate of each (model, task, method) on the seeds of the report.

    The best rate has the lowest mean validation loss over the tuning seeds. Refused methods have
    none. The seed is the outer loop, so an interrupted study has all methods on the same seeds.
    """
    best = best_rates(study, done)
    return [
        specification(study, model, task, method, best[model, task, method.name], seed)
        for seed in study.seeds
        for model in study.models
        for task in study.tasks
        for method in study.methods
        if (model, task, method.name) in best
    ]


def size(study: Study) -> int:
    """Number of runs, if no method is refused."""
    at_best = len(set(study.seeds) - set(study.tuning_seeds))
    swept = len(study.tuning_seeds) * len(study.learning_rates)
    return len(study.models) * len(study.tasks) * len(study.methods) * (swept + at_best)


def best_rates(study: Study, done: Iterable[RunRecord]) -> dict[tuple[str, str, str], float]:
    """Rates with the lowest validation loss, among those that ran on all tuning seeds."""
    losses: dict[tuple[str, str, str], dict[float, list[float]]] = {}
    wanted = {spec.key for spec in tuning_runs(study)}
    for record in done:
        spec = record.spec
        if record.key in wanted and record.refused is None:
            of = losses.setdefault((spec.model, spec.task, spec.method.name), {})
            of.setdefault(spec.learning_rate, []).append(record.validation_loss)
    seeds = len(study.tuning_seeds)
    means = {
        which: {rate: sum(each) / seeds for rate, each in of.items() if len(each) == seeds}
        for which, of in losses.items()
    }
    return {which: min(of, key=lambda rate: (of[rate], rate)) for which, of in means.items() if of}
