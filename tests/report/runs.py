"""Runs with losses and a recipe, as finetune leaves them, and large ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from drlora_core import AllocatorConfig, AllocatorEngine
from tests.core import recorded

RECIPE = (
    "# All options of a run.\n# Python 3.12.0, drlora 0.1.0, torch 2.13.0\nsteps: 30\nseed: 0\n"
)


def write_run(path: Path, **changes: Any) -> Path:
    """Write the folder of a run of 20 of 30 planned steps, compared with uniform LoRA."""
    recorded.record(path / "recording", **changes)
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0}]
    rows += [{"step": step, "loss": 3.0 - step / 10} for step in range(1, 21)]
    rows += [{"step": 10, "eval_loss": 2.5}, {"step": 15, "loss": None}, {"train_loss": 2.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "lo'
    (path / "metrics.jsonl").write_text(text)
    (path / "uniform").mkdir()
    (path / "uniform" / "metrics.jsonl").write_text('{"step": 20, "eval_loss": 1.5}\n')
    outcomes = [
        {"method": "greedy", "loss_before": 3.0, "loss_after": 1.0, "skipped_steps": 0},
        {"method": "uniform", "loss_before": 3.0, "loss_after": 1.5, "budget": 40},
    ]
    (path / "result.json").write_text(json.dumps(outcomes))
    (path / "run.yaml").write_text(RECIPE)
    return path


def write_large(path: Path, layers: int, experts: int, steps: int, events: int) -> Path:
    """Record a run of a large model with statistics that no compression makes small."""
    config = AllocatorConfig.for_training(steps, r_init=4, r_target=8, r_max=24, events=events)
    engine = AllocatorEngine(config)
    for layer in range(layers):
        engine.add_layer(f"model.layers.{layer}.mlp.experts", experts)
    engine.record_to(path / "recording")
    rng = np.random.default_rng(0)
    level = rng.dirichlet(np.full(experts, 0.6), size=layers)
    for _ in range(steps):
        noise = rng.lognormal(0.0, 0.3, (2, layers, experts))
        engine.observe_all(routing=level * noise[0], importance=noise[1])
        engine.step()
    engine.record_to(None)
    rows = [{"step": step, "loss": 1.0 + rng.random()} for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
