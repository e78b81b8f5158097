"""What the checks look at, the same for a live engine and for a recording.

Shapes: T steps, N experts of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.engine import AllocatorEngine
from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording.data import Recording
from drlora_core.replay import replay


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
    events: tuple[GrowthEvent, ...] | None
    """None on a live engine, which keeps no past."""
    recording: Recording | None

    def growth(self, name: str) -> IntArray:
        """Units each expert got since the start, [N]."""
        return self.ranks[name] - self.config.starting_rank

    def progress(self) -> float:
        """Share of the whole growth (or cut) that was made; 1 where there is none to make."""
        whole = sum(self.layers.values()) * (self.config.r_target - self.config.starting_rank)
        made = sum(int(self.growth(name).sum()) for name in self.layers)
        return made / whole if whole else 1.0


def from_engine(engine: AllocatorEngine) -> Subject:
    """Look at a live engine."""
    if not engine.layer_names:
        raise LayoutError("the engine has no layers, so there is nothing to diagnose")
    names = engine.layer_names
    return Subject(
        config=engine.config,
        layers={name: engine.num_experts(name) for name in names},
        step=engine.step_count,
        ranks={name: engine.ranks(name) for name in names},
        routing={name: engine.routing_frequency(name) for name in names},
        importance={name: engine.rank_importance(name) for name in names},
        unplaced=sum(engine.state_dict()["carry"]),
        events=None,
        recording=None,
    )


def from_recording(recording: Recording, config: AllocatorConfig | None) -> Subject:
    """Look at a recording: at its own run, or at a replay where a configuration is given."""
    events, settings = recording.events, recording.config
    if config is not None:
        events, settings = replay(recording, config).events, config
    if settings is None:
        raise LayoutError("the recording has no configuration of its own; give one to diagnose it")
    if recording.steps == 0:
        raise LayoutError("the recording has no steps, so there is nothing to diagnose")
    start = settings.starting_rank
    return Subject(
        config=settings,
        layers=recording.layers,
        step=recording.steps,
        ranks=events[-1].ranks
        if events
        else {name: np.full(size, start) for name, size in recording.layers.items()},
        routing=_recent(recording, "routing"),
        importance=_recent(recording, "importance"),
        unplaced=events[-1].unplaced if events else 0,
        events=events,
        recording=recording,
    )


def _recent(recording: Recording, signal: str) -> dict[str, FloatArray]:
    rows = slice(recording.steps - max(1, recording.steps // 4), recording.steps)
    means = {name: window_mean(recording, name, signal, rows) for name in recording.layers}
    return {name: mean for name, mean in means.items() if mean is not None}


def window_mean(recording: Recording, name: str, signal: str, rows: slice) -> FloatArray | None:
    """Mean of a layer's ``routing`` or ``importance`` over steps that have it, [N], or None."""
    values = getattr(recording.layer(name), signal)[rows]
    values = values[~np.isnan(values[:, 0])]
    return values.mean(axis=0) if len(values) else None
