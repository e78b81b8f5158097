"""Pieces of work that are killed: how each is done, gone on with, and what must come out."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scripts.kills import finetunes
from scripts.kills.results import Outcome, digests

NEW, OLD = "new", "old"


class Job(NamedTuple):
    """Some work in a folder.

    Doing it again after a kill is what a user would do then; it must end with the same outcome.
    """

    kind: str
    name: str
    work: Callable[[Path], object]
    outcome: Callable[[Path], Outcome]
    prepare: Callable[[Path], object] = lambda place: None
    """Writes what is there before."""
    whole: tuple[str, ...] = ()
    """Files, as patterns, that must be the old or the new ones at every moment."""
    together: str = ""
    """A folder in which all files are old, or all are new; or it is refused."""
    processes: int = 1
    is_command: bool = True
    """Its errors are sentences of the command line."""


def all_jobs(world: Path) -> list[Job]:
    """Every piece of work, from the models, data and runs in a folder."""
    return [*_finetunes(world), *_commands(world), *_saves(), _record()]


def _finetunes(world: Path) -> list[Job]:
    variants = {("finetune", 1, name): words for name, words in finetunes.variants().items()}
    for router in ("frozen", "after_warmup"):
        for more in (["--quantization=nf4"], ["--quantization=fp4", "--layout=masked"]):
            words = ["olmoe", f"--router={router}", *more]
            variants["quantized", 1, " ".join(words)] = words
    for model, router in (("olmoe", "frozen"), ("qwen2_moe", "after_warmup")):
        words = [model, f"--router={router}", "--processes=2"]
        variants["processes", 2, " ".join(words)] = words
    return [
        Job(
            kind, name, functools.partial(finetunes.work, world, words), finetunes.outcome,
            processes=processes, whole=("run/**/adapter/*.safetensors",),
        )
        for (kind, processes, name), words in variants.items()
    ]  # fmt: skip


def _commands(world: Path) -> list[Job]:
    """Commands that write a folder from a finished run."""
    words = {
        "export": ["export", str(world / "finished")],
        "export --per-expert": ["export", str(world / "finished"), "--per-expert"],
        "export --rank 2": ["export", str(world / "finished"), "--rank=2"],
        "merge": ["merge", str(world / "finished")],
        "merge, 4 bits unpacked": ["merge", str(world / "packed")],
        "merge --quantize": ["merge", str(world / "packed"), "--quantize"],
    }
    return [
        Job(
            name.split(",")[0].split()[0], name, functools.partial(_command, given),
            lambda place: digests(place, "out/*"), whole=("out/*",), together="out",
        )
        for name, given in words.items()
    ]  # fmt: skip


def _command(words: list[str], place: Path) -> None:
    from drlora_core.cli import main

    out = place / "out"
    if out.is_dir() and any(out.iterdir()):
        return  # it is there; the command would say so
    main([*words, f"--output={out}"])


def _saves() -> list[Job]:
    """Functions that write over what they wrote before."""
    writers = {
        "save": ("save", lambda adapter, out: adapter.save_pretrained(out)),
        "save_pretrained of the model": (
            "save",
            lambda adapter, out: adapter.model.save_pretrained(out),
        ),
        "export over an export": ("export", lambda adapter, out: adapter.export_peft(out)),
        "merge over a merge": ("merge", lambda adapter, out: adapter.merge_and_save(out)),
    }
    return [
        Job(
            kind, name, functools.partial(_save, write, 2), lambda place: digests(place, "out/*"),
            prepare=functools.partial(_save, write, 1), is_command=False,
            # Transformers writes the base in place.
            whole=("out/drlora*",) if "model" in name else ("out/*",),
            together="out" if " over " in name else "",
        )
        for name, (kind, write) in writers.items()
    ]  # fmt: skip


def _save(write: Callable[[Any, Path], object], steps: int, place: Path) -> None:
    """Train for some steps, and write what is trained."""
    import torch

    from scripts.fuzz.torch_targets import attach, base

    adapter = attach()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens = torch.arange(1, 13).reshape(1, 12)
        base().train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    write(adapter, place / "out")


def _record() -> Job:
    return Job(
        "record", "record", _record_run,
        lambda place: {"recording": finetunes.read_recording(place / "out")}, is_command=False,
    )  # fmt: skip


def _record_run(place: Path) -> None:
    """Drive a recorded engine for 40 steps; its state is saved after every fifth."""
    import numpy as np

    from drlora_core import AllocatorConfig, AllocatorEngine
    from drlora_core.recording import RecordingWriter

    settings = AllocatorConfig(
        r_init=2, r_target=4, r_max=8, warmup_steps=4, growth_interval=4, growth_end=32,
        policy="move",
    )  # fmt: skip
    engine, state = AllocatorEngine(settings), place / "engine.pickle"
    for name in ("first", "second"):
        engine.add_layer(name, 6)
    if state.is_file() and (place / "out").is_dir():
        engine.load_state_dict(pickle.loads(state.read_bytes()))
    else:
        shutil.rmtree(place / "out", ignore_errors=True)
    engine.record_to(RecordingWriter(place / "out", engine, chunk_steps=2))
    while engine.step_count < 40:
        draw = np.random.default_rng(engine.step_count)
        for name in engine.layer_names:
            engine.observe(name, routing=draw.random(6), importance=draw.random((6, 8)))
        engine.step()
        if engine.step_count % 5 == 0:
            part = place / "part.pickle"
            part.write_bytes(pickle.dumps(engine.state_dict()))
            os.replace(part, state)
    engine.record_to(None)
