"""``drlora finetune`` as a piece of work, in many variants, and how a user goes on with it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from scripts.kills.results import Outcome, digest, digests

STEPS = [
    "--steps=6",
    "--save-every=2",
    "--batch-size=4",
    "--learning-rate=2e-2",
    "--eval-fraction=0.02",
]
RANKS = ["--r-target=2", "--r-max=6"]
ROUTERS, LAYOUTS = ("frozen", "after_warmup", "trainable"), ("pooled", "masked")
MODELS = ("olmoe", "qwen2_moe", "jetmoe")
POLICIES = (
    [], ["--policy=move", "--r-init=2"], ["--policy=prune"], ["--policy=uniform"],
    ["--timetable=late"], ["--policy=proportional", "--scope=global"], ["--policy=random"],
)  # fmt: skip
EXTRAS: tuple[list[str], ...] = (
    [], ["--dropout=0.1"], ["--attention-rank=2"], ["--compare=uniform"], ["--accumulation=2"],
    ["--method=dpo"], ["--packing", "--eval-every=2"],
)  # fmt: skip
NEVER_THE_SAME = ("time", "files", "per_second", "seconds", "memory", "num_tokens")
"""Parts of the names of figures that differ between two runs in peace."""


def variants() -> dict[str, list[str]]:
    """Options of a run, by a name: every model with every router and layout, other ones in turn."""
    found = {}
    every = itertools.product(LAYOUTS, MODELS, ROUTERS)
    for number, (layout, model, router) in enumerate(every):
        policy, extra = POLICIES[number % 7], EXTRAS[(number * 2 + number // 7) % 7]
        if "--policy=uniform" in policy and "--compare=uniform" in extra:
            extra = []
        words = [model, f"--router={router}", f"--layout={layout}", *policy, *extra]
        found[" ".join(words)] = words
    return found


def work(world: Path, words: list[str], place: Path) -> None:
    """Run the command, or go on with what it has left, as its words say."""
    from drlora_core.cli import main

    run, (model, *options) = place / "run", words
    if (run / "result.json").is_file():
        return  # finished; the command would say so
    processes = [word for word in options if word.startswith("--processes")]
    if (run / "run.yaml").is_file():
        main(["finetune", f"--resume={run}", *processes])
    data = world / ("pairs.jsonl" if "--method=dpo" in options else "sums.jsonl")
    main(["finetune", str(world / model), str(data), f"--output={run}", *STEPS, *RANKS, *options])


def outcome(place: Path) -> Outcome:
    """What a run has trained, decided, recorded and measured."""
    run = place / "run"
    found: Outcome = digests(run, "**/adapter/*", "checkpoints/checkpoint-6/drlora_*.safetensors")
    for recording in sorted(run.rglob("recording")):
        found[f"{recording.relative_to(place)}"] = read_recording(recording)
    for metrics in sorted(run.rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        found[f"{metrics.relative_to(place)}"] = digest([_same(row) for row in rows])
    results = run / "result.json"
    if results.is_file():
        found["result"] = digest([_same(each) for each in json.loads(results.read_text())])
    return found


def _same(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if not any(part in k for part in NEVER_THE_SAME)}


def read_recording(folder: Path) -> str:
    """Digest of all that a recording holds."""
    import numpy as np

    from drlora_core.recording import Recording

    found = Recording.open(folder)
    arrays = [found.routing, found.importance, found.ranks]
    events = [
        (event.step, event.unplaced, *(each.tolist() for each in event.ranks.values()))
        for event in found.events
    ]
    parts = [np.asarray(each).tobytes().hex() for each in arrays if each is not None]
    return digest([found.steps, found.notes, parts, events])
