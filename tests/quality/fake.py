"""Made-up runs with known effects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import methods
from benchmarks.quality.records import Method, RunRecord, RunSpec, Training
from benchmarks.quality.runs import Results, read

TRAINING = Training(steps=100, batch_size=8)
LAYERS = ("layers.0", "layers.1")
RELEVANCE = {name: np.array([3.0, 2.0, 1.0, 0.5, 0.0, 0.0]) for name in LAYERS}
BETA2 = {"betas": (0.9, 0.999)}
VARIANTS = (
    Method(name="gamma_0", config={"gamma": 0.0}),
    Method(name="gamma_2", config={"gamma": 2.0}),
    Method(name="events_2", training={"events": 2}),
    Method(name="drlora_beta2", training=BETA2),
    Method(name="uniform_beta2", config={"policy": "uniform"}, training=BETA2),
)
NAMES = (
    "uniform",
    "uniform_peft",
    "drlora",
    "without_f",
    "without_g",
    "uniform_growth",
    "random",
    "static_profile",
    "prune",
)
METHODS = {name: methods.METHODS[name] for name in (*NAMES, "early")}
METHODS |= {each.name: each for each in VARIANTS}
USUAL = [name for name in METHODS if "beta2" not in name and name != "early"]
EFFECTS = {"drlora": -0.4, "without_f": -0.3, "without_g": -0.35, "prune": -0.2, "gamma_2": -0.4}
"""Test loss against uniform; 0 where none is given."""


def record(
    method: str,
    loss: float,
    *,
    seed: int = 0,
    rate: float = 1e-3,
    task: str = "codes",
    **fields: object,
) -> RunRecord:
    """One run; fields replace those of the record."""
    trained = METHODS[method].training
    spec = RunSpec(
        model="embedded",
        task=task,
        method=METHODS[method],
        learning_rate=rate,
        seed=seed,
        training=TRAINING.model_copy(update=trained),
    )
    uneven = method != "uniform" and METHODS[method].kind == "drlora"
    ranks = [5, 3, 1, 1, 1, 1] if uneven else [2] * 6
    signal = RELEVANCE[LAYERS[0]]
    values = {
        "key": spec.key,
        "spec": spec,
        "validation_loss": loss,
        "test_loss": loss,
        "test_exact_match": max(0.0, min(1.0, 1.0 - loss / 2)),
        "start_loss": 3.0,
        "curve": [(50, loss + 0.5), (100, loss)],
        "total_rank": 24,
        "budget": 24,
        "trained_parameters": 1000,
        "ranks": dict.fromkeys(LAYERS, ranks),
        "routing": {name: (signal + 0.1).tolist() for name in LAYERS} if uneven else {},
        "importance": {name: signal[::-1].tolist() for name in LAYERS} if uneven else {},
        "seconds": 12.0,
        "versions": {"torch": "2.13.0", "processor": "a processor, 2 cores"},
    }
    return RunRecord.model_validate(values | fields)


def study(
    effects: Mapping[str, float] = EFFECTS,
    *,
    names: Iterable[str] = USUAL,
    tasks: Iterable[str] = ("a", "b", "c", "d", "e"),
    seeds: int = 5,
    rates: Mapping[float, float] | None = None,
    noise: float = 0.02,
) -> list[RunRecord]:
    """Runs of every method; seeds share a large part of their noise, as paired runs do.

    Args:
        effects: test loss against uniform by method.
        names: of the methods to run.
        tasks: names; each has a level of its own.
        seeds: number of seeds.
        rates: learning rate to what it adds to the loss; all seeds run at each.
        noise: of what seeds do not share.
    """
    generator = np.random.default_rng(0)
    runs = []
    for level, task in enumerate(tasks):
        for seed in range(seeds):
            shared = 1.2 + 0.02 * level + generator.normal(scale=0.1)
            for method in names:
                own = shared + effects.get(method, 0.0) + generator.normal(scale=noise)
                runs += [
                    record(method, own + extra, seed=seed, rate=rate, task=task)
                    for rate, extra in (rates or {1e-3: 0.0}).items()
                ]
    return runs


def write(path: Path, runs: Iterable[RunRecord]) -> Path:
    """A results file of these runs."""
    path.write_text("".join(run.model_dump_json() + "\n" for run in runs))
    return path


def known(model: str, task: str) -> Mapping[str, np.ndarray] | None:
    """Relevance is known for task a."""
    return RELEVANCE if task == "a" else None


def results(folder: Path, effects: Mapping[str, float] = EFFECTS, **options: Any) -> Results:
    """Results of ``study``, read from a file."""
    return read([write(folder / "full.jsonl", study(effects, **options))])
