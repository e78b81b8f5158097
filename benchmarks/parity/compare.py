"""Run modes in one launch of several processes, and compare each with one process."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from benchmarks.parity.files import Passage, Passages
from benchmarks.parity.launch import launch
from benchmarks.parity.modes import MODES, Mode, run_alone
from benchmarks.parity.training import Trace

EXACT = 1e-10
"""Largest relative difference that rounding in float64 explains, after 100 steps of Adam."""


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
        figures = (self.phi, self.s, self.loss, self.parameters)
        right = self.equal_ranks and self.equal_tokens and self.processes == 0.0
        return right and not self.error and all(figure < EXACT for figure in figures)


def compare(world: int, modes: Sequence[Mode], steps: int) -> list[Difference]:
    """Compare modes in one launch of ``world`` processes."""
    return list(launch(world, partial(_compare, [MODES.index(mode) for mode in modes], steps)))


def compare_files(checkpoints: bool) -> list[Passage]:
    """Save and load between all topologies, in one launch of two processes.

    Args:
        checkpoints: through torch.distributed.checkpoint too.
    """
    return list(launch(2, partial(_compare_files, checkpoints)))


def _compare_files(checkpoints: bool, folder: Path, alone: Any) -> list[Passage]:
    passages = Passages(folder, alone)
    return [*passages.files(), *(passages.checkpoints() if checkpoints else [])]


def _compare(places: list[int], steps: int, folder: Path, alone: Any) -> list[Difference]:
    known: dict[str, Trace] = {}
    found = []
    for place in places:
        mode, world = MODES[place], distributed.get_world_size()
        if mode.recipe.key not in known:
            known[mode.recipe.key] = run_alone(mode.recipe, steps, alone)
        try:
            trace = mode.spread(folder / "model", mode.recipe, steps)
            found.append(_measure(trace, known[mode.recipe.key], place, world, steps))
        except Exception:
            error = traceback.format_exc()
            found.append(Difference(mode=place, world=world, steps=steps, error=error))
    return found


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
