"""Small runs of the engine with made-up statistics, recorded: what the tests here start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from drlora_core import AllocatorConfig, AllocatorEngine, GrowthEvent, Policy

LAYERS = {"first": 6, "second": 4}


def config(**changes: Any) -> AllocatorConfig:
    """Return a small configuration: three events after steps 8, 12 and 16."""
    values: dict[str, Any] = {
        "r_init": 2,
        "r_target": 4,
        "r_max": 8,
        "warmup_steps": 4,
        "growth_interval": 4,
        "growth_end": 16,
    }
    return AllocatorConfig(**(values | changes))


def build(
    settings: AllocatorConfig, layers: dict[str, int] | None = None, policy: Policy | None = None
) -> AllocatorEngine:
    """Return an engine with the layers of these tests."""
    engine = AllocatorEngine(settings, policy=policy)
    for name, size in (layers or LAYERS).items():
        engine.add_layer(name, size)
    return engine


def drive(engine: AllocatorEngine, steps: int) -> list[GrowthEvent]:
    """Feed steps whose statistics depend on the step number only; every seventh skips a layer."""
    events = []
    for _ in range(steps):
        step = engine.step_count + 1
        rng = np.random.default_rng([7, step])
        for name in engine.layer_names:
            size = engine.num_experts(name)
            sample = {"routing": rng.random(size), "importance": rng.random((size, 8))}
            if step % 7 == 0 and name == "second":
                engine.skip(name)
            else:
                engine.observe(name, **sample, tokens=step)
        events += [event for event in [engine.step()] if event is not None]
    return events


def record(
    path: Path, steps: int = 20, **changes: Any
) -> tuple[AllocatorEngine, tuple[GrowthEvent, ...]]:
    """Record a run; return its engine and events."""
    engine = build(config(**changes))
    engine.record_to(path)
    events = drive(engine, steps)
    engine.record_to(None)
    return engine, tuple(events)
