"""What a check gets and returns, the same for a live engine and for a recording.

Shapes: N experts of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from drlora_core import runs
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.engine import AllocatorEngine
from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording import Recording


class NotCheckedError(Exception):
    """A check cannot be made on this subject; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A problem that a check found."""

    message: str  # what was found
    advice: str  # what to try
    evidence: Mapping[str, Any]  # plain numbers, strings, and dicts of numbers by layer
    severity: Literal["warning", "note"] = "warning"
    name: str = ""  # of the check, as in docs/diagnostics.md; `diagnose` sets it

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.name}]\n  try: {self.advice}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Limits of the checks; docs/diagnostics.md describes each check."""

    progress: float = 0.5  # share of the growth to be placed before its spread is judged
    few_experts: float = 0.6  # saturation: at most this share of experts grew, ...
    few_factor: float = 1.25  # ... at most this many times the fewest that r_max allows, ...
    full_share: float = 0.8  # ... and at least this share of the growth is at r_max
    even_distance: float = 0.05  # total variation from even ranks, up to which they are even
    reliable_correlation: float = 0.5  # least rank correlation of g between two early windows
    noise_correlation: float = 0.2  # a signal is noise if its halves correlate less than this
    flat_variation: float = 0.05  # a signal with a smaller coefficient of variation is flat
    unrelated_correlation: float = 0.1  # largest rank correlation of unrelated f and g
    stagnant_events: int = 2  # number of last events without growth although budget is left
    traffic_loss: float = 0.5  # relative loss of routing weight since the first event
    misplaced_share: float = 0.25  # share of the rank above r_target that lost its traffic
    monopoly_ratio: float = 2.0  # growth of a layer over its even share, scope ``global``
    window: int = 3  # least number of steps in a window


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A run, up to its present step; mappings are by layer name, arrays are [N]."""

    config: AllocatorConfig
    layers: Mapping[str, int]  # experts of each layer
    step: int
    starts: Mapping[str, IntArray]  # ranks before the first step
    ranks: Mapping[str, IntArray]
    routing: Mapping[str, FloatArray]  # f now (a recording: mean of its last quarter)
    importance: Mapping[str, FloatArray]  # g likewise; no entry for a layer never recorded
    unplaced: int  # units carried to the next event
    events: tuple[GrowthEvent, ...] | None = None  # None: a live engine keeps no history
    recording: Recording | None = None

    def growth(self, name: str) -> IntArray:
        return self.ranks[name] - self.starts[name]

    def need_recording(self) -> Recording:
        if self.recording is None:
            raise NotCheckedError("a live engine keeps no past samples; diagnose its recording")
        return self.recording

    def need_growth_policy(self) -> None:
        if self.config.policy in ("uniform", "prune"):
            raise NotCheckedError(f"policy {self.config.policy!r} does not grow")
        if not self.config.ranks_change:
            raise NotCheckedError("the budget is spent at the start: nothing grows")

    def need_growth(self, share: float) -> None:
        """Need a policy that grows, and at least this share of the growth to be placed.

        With policy ``move``, growth goes on when the budget is met: this share of the events.
        """
        self.need_growth_policy()
        if self.config.policy == "move":
            past = sum(step <= self.step for step in self.config.growth_steps)
            if past < share * self.config.num_events:
                raise NotCheckedError(
                    f"{past} of {self.config.num_events} events are past; this check needs "
                    f"{share:.0%}"
                )
            return
        budget = sum(self.layers.values()) * self.config.r_target
        planned = budget - sum(int(start.sum()) for start in self.starts.values())
        if not planned:
            raise NotCheckedError("the budget is spent at the start: nothing grows")
        placed = sum(int(self.growth(name).sum()) for name in self.layers) / planned
        if placed < share:
            raise NotCheckedError(
                f"{placed:.0%} of the growth is placed; this check needs {share:.0%}"
            )


def from_engine(engine: AllocatorEngine) -> Subject:
    names = engine.layer_names
    if not names:
        raise LayoutError("the engine has no layers, so there is nothing to diagnose")
    return Subject(
        config=engine.config,
        layers={name: engine.num_experts(name) for name in names},
        step=engine.step_count,
        starts=_equal_ranks({name: engine.num_experts(name) for name in names}, engine.config),
        ranks={name: engine.ranks(name) for name in names},
        routing={name: engine.routing_frequency(name) for name in names},
        importance={name: engine.rank_importance(name) for name in names},
        unplaced=sum(engine.state_dict()["carry"]),
    )


def from_run(run: runs.Run) -> Subject:
    recording, events = run.recording, run.events
    if recording.steps == 0:
        raise LayoutError("the recording has no steps, so there is nothing to diagnose")
    recent = -max(1, recording.steps // 4)
    return Subject(
        config=run.config,
        layers=recording.layers,
        step=recording.steps,
        starts=run.starts,
        ranks=events[-1].ranks if events else run.starts,
        routing=window_means(recording, "routing", recent),
        importance=window_means(recording, "importance", recent),
        unplaced=events[-1].unplaced if events else 0,
        events=events,
        recording=recording,
    )


def _equal_ranks(layers: Mapping[str, int], config: AllocatorConfig) -> dict[str, IntArray]:
    return {
        name: np.full(size, config.starting_rank, dtype=np.int64) for name, size in layers.items()
    }


def window_means(
    recording: Recording, signal: str, start: int = 0, stop: int | None = None
) -> dict[str, FloatArray]:
    """Mean ``routing`` or ``importance`` of steps ``start:stop``, [N], of layers with samples."""
    means = {}
    for name in recording.layers:
        values = getattr(recording.layer(name), signal)[start:stop]
        values = values[~np.isnan(values[:, 0])]
        if len(values):
            means[name] = values.mean(axis=0)
    return means
