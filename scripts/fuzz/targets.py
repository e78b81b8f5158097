"""The readers: what each reads, and files that it reads rightly, to start from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_core.cli.common import build_config
from drlora_core.diagnostics import diagnose
from drlora_core.errors import DRLoRAError
from drlora_core.model_shape import read_model_config
from drlora_core.plan import make_plan
from drlora_core.replay import replay
from drlora_core.report import write_report
from drlora_core.runs import open_run

ACCEPTED = (DRLoRAError, OSError, ValidationError)
"""What a reader may raise; the command line says each in a sentence."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader, and the files of a folder of which one is damaged at a time."""

    write: Callable[[Path], None]
    read: Callable[[Path], object]
    files: tuple[str, ...]
    share: float = 1.0
    """Of the damaged inputs of a reader; fast ones get more, slow ones fewer."""
    seconds: float = 2.0
    """Of the processor, at the most; more only where a model is trained."""

    def share_of(self, runs: int) -> int:
        """How many damaged inputs it gets."""
        return max(1, round(self.share * runs))


def each(*readers: Callable[[], object]) -> None:
    """Let several read a folder; one may refuse what another takes."""
    for read in readers:
        try:
            read()
        except ACCEPTED:
            continue


def check_finite(*arrays: Any) -> None:
    """Numbers that were accepted have to be finite."""
    for array in arrays:
        assert np.isfinite(np.asarray(array, dtype=np.float64)).all(), "a number is not finite"


def make_engine() -> AllocatorEngine:
    engine = AllocatorEngine(AllocatorConfig.for_training(20, r_target=4, r_max=8))
    for name, size in (("first", 6), ("second", 4)):
        engine.add_layer(name, size)
    return engine


def drive(engine: AllocatorEngine, steps: int) -> None:
    draw = np.random.default_rng(0)
    for _ in range(steps):
        for name in engine.layer_names:
            size = engine.num_experts(name)
            engine.observe(name, routing=draw.random(size), importance=draw.random(size))
        engine.step()


def write_recording(folder: Path) -> None:
    engine = make_engine()
    engine.record_to(folder / "recording")
    drive(engine, 20)
    engine.record_to(None)


def write_run(folder: Path) -> None:
    write_recording(folder)
    rows = [{"step": 0, "eval_loss": 3.0}, *({"step": s, "loss": 3 / s} for s in range(1, 21))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = [{"method": "greedy", "loss_before": 3.0, "loss_after": 1.0, "skipped_steps": 0}]
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "run.yaml").write_text("# All options.\nsteps: 30\nmethod: sft\n")


def read_run(folder: Path) -> None:
    run = open_run(folder)
    replay(run.recording)
    check_finite(*run.history.signals, run.losses.training, run.losses.held_out)
    diagnose(run)


def read_report(folder: Path) -> None:
    write_report(open_run(folder))


def write_snapshot(folder: Path) -> None:
    engine = make_engine()
    drive(engine, 12)
    state = json.dumps(engine.state_dict(), default=np.ndarray.tolist)
    (folder / "state.json").write_text(state)


def read_snapshot(folder: Path) -> None:
    """Load a state that came as JSON, whose lists of numbers are arrays."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except (ValueError, RecursionError):
        return
    engine = make_engine()
    before = json.dumps(engine.state_dict(), default=np.ndarray.tolist)
    try:
        engine.load_state_dict(_with_arrays(state))
    except ACCEPTED:
        now = json.dumps(engine.state_dict(), default=np.ndarray.tolist)
        assert now == before, "the engine is not as it was"
        raise
    drive(engine, 12)
    for name in engine.layer_names:
        check_finite(engine.saliency(name), engine.routing_frequency(name))


def _with_arrays(state: Any) -> Any:
    layers = state.get("layers") if isinstance(state, dict) else None
    for layer in layers.values() if isinstance(layers, dict) else ():
        for field, value in layer.items() if isinstance(layer, dict) else ():
            if isinstance(value, list):
                with contextlib.suppress(ValueError):
                    layer[field] = np.array(value)
    return state


def write_profile(folder: Path) -> None:
    write_recording(folder)
    draw = np.random.default_rng(0)
    layers = {name: [list(draw.random(6)), list(draw.random(6))] for name in ("a", "b")}
    (folder / "profile.json").write_text(json.dumps(layers))


def read_profile(folder: Path) -> None:
    """Start from means of f and g that came as JSON, and from a recording."""
    config = AllocatorConfig(r_init=0, r_target=4, r_max=16, policy="uniform")

    def start(statistics: Any, policy: str) -> None:
        engine = AllocatorEngine.from_profile(config, statistics, policy)
        for name in engine.layer_names:
            assert 0 <= engine.ranks(name).sum() <= engine.budget(name)

    try:
        means = json.loads((folder / "profile.json").read_bytes())
    except (ValueError, RecursionError):
        means = None
    for policy in ("sieve", "profile", "gradient"):
        each(
            lambda policy=policy: start(means, policy),
            lambda policy=policy: start(folder / "recording", policy),
        )


def write_trace(folder: Path) -> None:
    draw = np.random.default_rng(0)
    tokens = np.full(12, 64)
    np.savez(folder / "trace.npz", weight_sum=draw.random((12, 2, 8)), tokens=tokens)


def write_shape(folder: Path) -> None:
    config = {
        "model_type": "olmoe", "num_experts": 16, "num_hidden_layers": 4, "hidden_size": 64,
        "intermediate_size": 32, "num_experts_per_tok": 2, "vocab_size": 300, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_settings(folder: Path) -> None:
    (folder / "allocator.json").write_text(AllocatorConfig.for_training(200).model_dump_json())


TARGETS = {
    "run": Target(
        write_run,
        read_run,
        ("recording/recording.json", "recording/*.npz", "metrics.jsonl", "result.json", "run.yaml"),
        share=0.4,
    ),
    "trace": Target(
        write_trace, lambda folder: open_run(folder / "trace.npz"), ("trace.npz",), share=2.0
    ),
    "shape": Target(
        write_shape,
        lambda folder: make_plan(
            read_model_config(folder / "config.json"), AllocatorConfig.for_training(200)
        ),
        ("config.json",),
        share=2.0,
    ),
    "settings": Target(
        write_settings,
        lambda folder: build_config({}, folder / "allocator.json", []),
        ("allocator.json",),
        share=2.0,
    ),
    "snapshot": Target(write_snapshot, read_snapshot, ("state.json",), share=2.0),
    "profile": Target(
        write_profile,
        read_profile,
        ("profile.json", "recording/recording.json", "recording/*.npz"),
        share=0.5,
    ),
    "report": Target(
        write_run,
        read_report,
        ("recording/recording.json", "recording/*.npz", "metrics.jsonl", "result.json", "run.yaml"),
        share=0.01,
    ),
}
