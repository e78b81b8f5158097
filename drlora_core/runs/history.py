"""f, g and S over the steps of a run, from its recording and its decisions.

Shapes: H steps that are kept, E experts of all layers, one layer after the other, N experts of a
layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from drlora_core import state as states
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.events import GrowthEvent
from drlora_core.pruning import follow, initial_order
from drlora_core.recording import Recording
from drlora_core.replay import read_dimensions
from drlora_core.state import State

MOST_STEPS = 60


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SignalHistory:
    """The signals after the update of some steps, and before the event that may follow it."""

    steps: IntArray
    """Optimizer steps, counted from 1, int64 [H]; steps of events first of all."""
    routing: FloatArray
    """f, [H, E]."""
    importance: FloatArray
    """g, [H, E]; after an event it starts anew for the experts that grew."""
    saliency: FloatArray
    """S, [H, E]; at the step of an event, what it was decided by."""

    def row_at(self, step: int) -> int:
        """Return the last row that is not after a step, and the first if all are."""
        return max(int(np.searchsorted(self.steps, step, side="right")) - 1, 0)

    @property
    def signals(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """f, g and S."""
        return self.routing, self.importance, self.saliency


def signal_history(
    recording: Recording,
    config: AllocatorConfig,
    starts: Mapping[str, IntArray],
    events: Sequence[GrowthEvent],
    most: int = MOST_STEPS,
) -> SignalHistory:
    """Drive the averages through a recording, with the ranks that the events gave.

    Args:
        recording: the statistics.
        config: decays and exponents.
        starts: ranks before the first step, [N] by layer.
        events: the decisions.
        most: steps to keep: those of the events, or of many events two thirds of ``most``; the
            others are spread evenly.
    """
    kept = _choose_steps(recording.steps, [event.step for event in events], most)
    decided = {event.step: event for event in events}
    rows: dict[str, list[FloatArray]] = {"routing": [], "importance": [], "saliency": []}
    state = states.make_state(config, {name: starts[name] for name in recording.layers})
    cut_layers = recording.layers if config.cuts else {}
    orders = {name: initial_order(n, config.r_max) for name, n in cut_layers.items()}
    for step in range(1, recording.steps + 1):
        _observe(state, config, recording, step - 1, orders)
        if step in kept:
            rows["routing"].append(states.routing_frequency(state, config))
            rows["importance"].append(states.rank_importance(state, config))
            rows["saliency"].append(states.expert_saliency(state, config))
        if step in decided:
            state = _apply(state, decided[step])
            cuts = decided[step].cut.items() if orders else ()
            orders |= {n: follow(orders[n], cut) for n, cut in cuts}
    none = np.zeros((0, recording.num_experts))
    arrays = {name: np.stack(values) if values else none for name, values in rows.items()}
    return SignalHistory(np.array(sorted(kept), dtype=np.int64), **arrays)


def _choose_steps(steps: int, events: Sequence[int], most: int) -> set[int]:
    if not steps:
        return set()
    seen = [step for step in events if step <= steps]
    decided = {seen[number] for number in evenly(len(seen), most * 2 // 3)}
    return decided | {1 + number for number in evenly(steps, most - len(decided))}


def evenly(count: int, most: int) -> list[int]:
    """Choose at most ``most`` of the numbers below ``count``: the first, the last, some between.

    Example:
        >>> evenly(100, 3), evenly(2, 3)
        ([0, 50, 99], [0, 1])
    """
    return [int(number) for number in np.linspace(0, count - 1, min(count, most)).round()]


def _observe(
    state: State,
    config: AllocatorConfig,
    recording: Recording,
    row: int,
    orders: Mapping[str, IntArray],
) -> None:
    """Update the averages with the samples of one step."""
    for name, place in state.places.items():
        record = recording.layer(name)
        if not record.presence[row]:
            continue
        ranks, importance = state.ranks[place.experts], record.importance_at(row)
        if config.cuts and record.dimensions is not None:
            importance = read_dimensions(record, row, ranks, orders[name])
        sample = states.check_sample(ranks, config, record.routing_at(row), importance)
        states.observe(state, config, place, sample)


def _apply(state: State, event: GrowthEvent) -> State:
    """Return the state after an event; an expert gains its delta and what was cut of it."""
    growth = np.concatenate([event.deltas[name] for name in state.places])
    if event.cut:
        marked = np.concatenate([event.cut[name] for name in state.places])
        growth = growth + marked.sum(axis=1)
        state = states.cut(state, marked)
    return states.grow(state, growth)
