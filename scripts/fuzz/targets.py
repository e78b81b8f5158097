"""The readers: what each reads, and files that it reads rightly, to start from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_core.cli.common import build_config
from drlora_core.errors import DRLoRAError
from drlora_core.model_shape import read_model_config
from drlora_core.replay import replay
from drlora_core.runs import open_run

ACCEPTED = (DRLoRAError, OSError, ValidationError)
"""What a reader may raise; the command line says each in a sentence."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader, and the files of a folder of which one is damaged at a time."""

    write: Callable[[Path], None]
    read: Callable[[Path], object]
    files: tuple[str, ...]


def write_recording(folder: Path) -> None:
    engine = AllocatorEngine(AllocatorConfig.for_training(20, r_target=4, r_max=8))
    for name, size in (("first", 6), ("second", 4)):
        engine.add_layer(name, size)
    engine.record_to(folder / "recording")
    draw = np.random.default_rng(0)
    for _ in range(20):
        for name in engine.layer_names:
            size = engine.num_experts(name)
            engine.observe(name, routing=draw.random(size), importance=draw.random(size))
        engine.step()
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
    assert np.isfinite(run.history.saliency).all(), "a saliency that is not finite"


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
    ),
    "trace": Target(write_trace, lambda folder: open_run(folder / "trace.npz"), ("trace.npz",)),
    "shape": Target(
        write_shape, lambda folder: read_model_config(folder / "config.json"), ("config.json",)
    ),
    "settings": Target(
        write_settings,
        lambda folder: build_config({}, folder / "allocator.json", []),
        ("allocator.json",),
    ),
}
