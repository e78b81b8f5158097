"""What a check gets and returns, the same for a live engine and for a recording.

Shapes: T steps, N experts of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.engine import AllocatorEngine
from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording import Recording
from drlora_core.replay import replay


class NotCheckedError(Exception):
    """A check cannot be made on this subject; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A problem that a check found."""

    message: str
    """What was found, one sentence."""
    advice: str
    """What to try, one sentence."""
    evidence: Mapping[str, Any]
    """The numbers behind it: plain numbers, strings, and dicts of numbers by layer."""
    severity: Literal["warning", "note"] = "warning"
    name: str = ""
    """Name of the check, as in docs/diagnostics.md; `diagnose` sets it."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.name}]\n  try: {self.advice}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Limits of the checks; all are shares or correlations unless said otherwise."""

    progress: float = 0.5
    """Share of the growth R that must be placed before its distribution is judged."""
    few_experts: float = 0.6
    """Saturation: at most this share of experts got any rank ..."""
    few_factor: float = 1.25
    """... at most this many times the fewest that r_max allows (a factor) ..."""
    full_share: float = 0.8
    """... and at least this share of the growth went to experts at r_max."""
    even_distance: float = 0.05
    """Largest total-variation distance from even ranks at which ranks are called even."""
    reliable_correlation: float = 0.5
    """Least rank correlation of importance between the two windows before the first event."""
    noise_correlation: float = 0.2
    """Rank correlation of a signal between the halves of a run, below which it is noise."""
    flat_variation: float = 0.05
    """Coefficient of variation over experts, below which a signal is flat."""
    unrelated_correlation: float = 0.1
    """Largest mean rank correlation of f and g at which they are called unrelated."""
    stagnant_events: int = 2
    """Last events in a row without growth, although quota was due and budget is left (count)."""
    traffic_loss: float = 0.5
    """Relative loss of routing weight since the first event, above which an expert lost traffic."""
    misplaced_share: float = 0.25
    """Share of the rank above r_target that may belong to experts that lost traffic."""
    monopoly_ratio: float = 2.0
    """Scope ``global``: growth of a layer over its even share, from which it is a monopoly."""
    window: int = 3
    """Least number of steps in a window (count)."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A run, up to its present step."""

    config: AllocatorConfig
    layers: Mapping[str, int]
    step: int
    ranks: Mapping[str, IntArray]
    """Ranks now, [N] by layer."""
    routing: Mapping[str, FloatArray]
    """f now (a recording: mean of its last quarter), [N]; empty where never recorded."""
    importance: Mapping[str, FloatArray]
    """g likewise."""
    unplaced: int
    """Units that limits left over, carried to the next event."""
    events: tuple[GrowthEvent, ...] | None = None
    """None on a live engine, which keeps no past."""
    recording: Recording | None = None

    def growth(self, name: str) -> IntArray:
        """Units each expert got since the start, [N]."""
        return self.ranks[name] - self.config.starting_rank

    def progress(self) -> float:
        """Share of the whole growth (or cut) that was made; 1 where none is planned."""
        whole = sum(self.layers.values()) * (self.config.r_target - self.config.starting_rank)
        made = sum(int(self.growth(name).sum()) for name in self.layers)
        return made / whole if whole else 1.0


def from_engine(engine: AllocatorEngine) -> Subject:
    """Describe a live engine."""
    names = engine.layer_names
    if not names:
        raise LayoutError("the engine has no layers, so there is nothing to diagnose")
    return Subject(
        config=engine.config,
        layers={name: engine.num_experts(name) for name in names},
        step=engine.step_count,
        ranks={name: engine.ranks(name) for name in names},
        routing={name: engine.routing_frequency(name) for name in names},
        importance={name: engine.rank_importance(name) for name in names},
        unplaced=sum(engine.state_dict()["carry"]),
    )


def from_recording(recording: Recording, config: AllocatorConfig | None) -> Subject:
    """Describe the recorded run, or its replay where a configuration is given."""
    events, settings = recording.events, recording.config
    if config is not None:
        events, settings = replay(recording, config).events, config
    if settings is None:
        raise LayoutError("the recording has no configuration of its own; give one to diagnose it")
    if recording.steps == 0:
        raise LayoutError("the recording has no steps, so there is nothing to diagnose")
    start = {n: np.full(size, settings.starting_rank) for n, size in recording.layers.items()}
    return Subject(
        config=settings,
        layers=recording.layers,
        step=recording.steps,
        ranks=events[-1].ranks if events else start,
        routing=_recent_means(recording, "routing"),
        importance=_recent_means(recording, "importance"),
        unplaced=events[-1].unplaced if events else 0,
        events=events,
        recording=recording,
    )


def _recent_means(recording: Recording, signal: str) -> dict[str, FloatArray]:
    return window_means(recording, signal, -max(1, recording.steps // 4), None)


def window_means(
    recording: Recording, signal: str, start: int | None, stop: int | None
) -> dict[str, FloatArray]:
    """Mean ``routing`` or ``importance`` of steps ``start:stop``, [N], of layers with samples."""
    means = {}
    for name in recording.layers:
        values = getattr(recording.layer(name), signal)[start:stop]
        values = values[~np.isnan(values[:, 0])]
        if len(values):
            means[name] = values.mean(axis=0)
    return means
