"""Run modes in one launch of several processes, and compare each with one process."""

from __future__ import annotations

import dataclasses
import datetime
import os
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import distributed, multiprocessing

from benchmarks.parity import training
from benchmarks.parity.modes import MODES, Mode, run_alone
from benchmarks.parity.training import Trace

EXACT, LOSS = 1e-11, 1e-6
"""Largest relative differences that rounding explains; Transformers computes losses in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a mode is from one process; the largest relative difference of any step."""

    mode: int
    """Its place in MODES."""
    world: int
    steps: int
    events: int = 0
    equal_ranks: bool = False
    """Whether all ranks were equal after every step."""
    equal_tokens: bool = False
    phi: float = float("nan")
    s: float = float("nan")
    loss: float = float("nan")
    parameters: float = float("nan")
    processes: float = float("nan")
    """Largest difference of the parameters between two processes."""
    error: str = ""

    @property
    def agrees(self) -> bool:
        """True if the processes decided as one, with all figures equal to rounding."""
        figures = (self.phi, self.s, self.parameters)
        right = self.equal_ranks and self.equal_tokens and self.processes == 0.0
        exact = self.loss < LOSS and all(figure < EXACT for figure in figures)
        return right and exact and not self.error


def compare(world: int, modes: Sequence[Mode], steps: int) -> list[Difference]:
    """Compare modes in one launch of ``world`` processes."""
    places = [MODES.index(mode) for mode in modes]
    with tempfile.TemporaryDirectory() as folder:
        training.build_model().save_pretrained(Path(folder) / "model")
        arguments = (folder, world, places, steps)
        multiprocessing.spawn(_work, arguments, nprocs=world)
        found: list[Difference] = torch.load(Path(folder) / "found.pt", weights_only=False)
        return found


def _work(rank: int, folder: str, world: int, places: list[int], steps: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(minutes=2),
    )
    alone = [distributed.new_group([each]) for each in range(world)][rank]
    known: dict[str, Trace] = {}
    found = []
    for place in places:
        mode = MODES[place]
        if mode.recipe.key not in known:
            known[mode.recipe.key] = run_alone(mode.recipe, steps, alone)
        try:
            trace = mode.spread(Path(folder) / "model", mode.recipe, steps)
            found.append(_measure(trace, known[mode.recipe.key], place, world, steps))
        except Exception:
            error = traceback.format_exc()
            found.append(Difference(mode=place, world=world, steps=steps, error=error))
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    distributed.barrier()
    # Not destroy_process_group: torch then joins a gloo thread while it holds the lock of the
    # interpreter, which that thread may need to free a tensor, and both wait for ever.
    os._exit(0)


def _measure(trace: Trace, alone: Trace, place: int, world: int, steps: int) -> Difference:
    pairs = list(zip(trace.samples, alone.samples, strict=True))
    held = list(zip(trace.parameters, alone.parameters, strict=True))
    return Difference(
        mode=place,
        world=world,
        steps=steps,
        events=trace.events,
        equal_ranks=trace.ranks == alone.ranks,
        equal_tokens=all(mine[2] == theirs[2] for mine, theirs in pairs),
        phi=max(_relative(mine[0], theirs[0]) for mine, theirs in pairs),
        s=max(_relative(mine[1], theirs[1]) for mine, theirs in pairs),
        loss=max(abs(a / b - 1.0) for a, b in zip(trace.losses, alone.losses, strict=True)),
        parameters=max(_relative(a.numpy(force=True), b.numpy(force=True)) for a, b in held),
        processes=_spread_of(torch.cat([each.reshape(-1) for each in trace.parameters])),
    )


def _relative(mine: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest value."""
    largest = np.abs(theirs).max()
    return float(np.abs(mine - theirs).max() / largest) if largest else float(np.abs(mine).max())


def _spread_of(values: torch.Tensor) -> float:
    """The largest difference of values between two processes."""
    lowest, highest = values.detach().clone(), values.detach().clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    return float((highest - lowest).abs().max())
