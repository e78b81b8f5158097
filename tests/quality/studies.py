"""Small studies, and records made up without training."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.methods import METHODS
from benchmarks.quality.records import Method, RunRecord, RunSpec, Training
from benchmarks.quality.study import Study

TINY = Training(
    steps=16,
    batch_size=2,
    max_tokens=64,
    evaluations=2,
    evaluation_rows=4,
    r_init=1,
    r_target=2,
    r_max=8,
)


def make_study(**changes: Any) -> Study:
    fields = {
        "name": "tiny",
        "description": "for tests",
        "models": ("embedded",),
        "tasks": ("codes", "strings"),
        "methods": ("uniform", "drlora"),
        "learning_rates": (0.01, 0.001),
        "tuning_seeds": (0,),
        "seeds": (0, 1, 2),
        "training": TINY,
    }
    return Study.model_validate({**fields, **changes})


def make_spec(method: str | Method = "drlora", **changes: Any) -> RunSpec:
    fields = {
        "model": "embedded",
        "task": "codes",
        "method": METHODS[method] if isinstance(method, str) else method,
        "learning_rate": 0.005,
        "seed": 0,
        "training": TINY,
    }
    return RunSpec.model_validate({**fields, **changes})


def make_record(spec: RunSpec, **figures: Any) -> RunRecord:
    """A record whose validation loss is the learning rate."""
    fields = {
        "validation_loss": spec.learning_rate,
        "test_loss": 1.0,
        "test_exact_match": 0.0,
        "start_loss": 2.0,
        "curve": [(0, 2.0)],
        "total_rank": 128,
        "budget": 128,
        "trained_parameters": 1,
        "ranks": {"layer": [2, 2]},
        "routing": {},
        "importance": {},
        "seconds": 0.1,
        "versions": {},
    }
    return RunRecord.model_validate({"key": spec.key, "spec": spec, **fields, **figures})
