"""Replay: drive a new engine with recorded statistics.

With the recording's own configuration and policy, a replay repeats the run's decisions exactly.
With others, it shows what they would have decided from the statistics of *this* run: a replay
cannot know how the statistics would have changed under other ranks.

Shapes: T steps, K events, N experts of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from drlora_core import notebook
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.engine import AllocatorEngine
from drlora_core.errors import LayoutError, StatisticError, check_layer
from drlora_core.events import GrowthEvent
from drlora_core.policies import Policy, policy_name
from drlora_core.pruning import follow, initial_order
from drlora_core.recording.data import LayerRecord, Recording
from drlora_core.saliency import active_dimensions

CAVEAT = (
    "A replay uses the statistics as recorded: it cannot know how they would have changed under "
    "other ranks."
)
# Fields of an event, and what they are called in `first_difference`.
DECISIONS = {"ranks": "rank", "deltas": "growth", "saliency": "saliency", "cut": "cut"}


@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    """The decisions of an engine on a recording."""

    recording: Recording  # the statistics
    config: AllocatorConfig
    policy: str  # name of the configuration's policy, or of the callable
    layers: dict[str, int]  # experts of each layer
    steps: int
    events: tuple[GrowthEvent, ...]
    starting_ranks: Mapping[str, IntArray]  # int64 [N] by layer
    final_ranks: Mapping[str, IntArray]  # after the last step, likewise
    engine: AllocatorEngine  # after the last step

    def __repr__(self) -> str:
        events = notebook.count(len(self.events), "event")
        total = notebook.total_rank(self.final_ranks)
        return f"Replay({self.policy}, {self.steps} steps, {events}, total rank {total})"

    def trajectory(self, name: str) -> IntArray:
        """Ranks of a layer at the start and after each event, int64 [K + 1, N]."""
        check_layer(name, self.layers)
        return np.stack([self.starting_ranks[name], *(event.ranks[name] for event in self.events)])

    def total_rank(self) -> IntArray:
        """Sum of all ranks at the start and after each event, int64 [K + 1]."""
        totals: IntArray = sum(self.trajectory(name).sum(axis=1) for name in self.layers)
        return totals


def replay(
    recording: Recording, config: AllocatorConfig | None = None, policy: Policy | None = None
) -> Replay:
    """Drive a new engine with a recording's statistics.

    Args:
        recording: the statistics.
        config: default: that of the recorded run, whose starting ranks are then taken as well;
            with another one every expert starts at ``config.starting_rank``.
        policy: a callable that replaces ``config.policy``.

    Raises:
        LayoutError: no configuration is known, or the policy needs what was not recorded.
        StatisticError, PolicyError: naming layer, step and value.

    Example:
        >>> recording = Recording.from_arrays(
        ...     {"experts": [[0.9, 0.1]] * 2}, {"experts": [[1.0, 1.0]] * 2})
        >>> config = AllocatorConfig(r_init=1, r_target=2, r_max=3, warmup_steps=0,
        ...                          growth_interval=1, growth_end=2)
        >>> replay(recording, config).final_ranks["experts"].tolist()
        [3, 1]
    """
    if (config := config or recording.config) is None:
        raise LayoutError("the recording has no configuration of its own; give one to replay it")
    if config.cuts and policy is None and (reason := why_no_cuts(recording, config)):
        raise LayoutError(reason)
    engine = AllocatorEngine(config, policy=policy)
    own = recording.starting_ranks if config == recording.config else None
    for name, size in recording.layers.items():
        engine.add_layer(name, size, ranks=None if own is None else own[name])
    starts = {name: engine.ranks(name) for name in recording.layers}
    events = tuple(_drive(engine, recording))
    return Replay(
        recording=recording,
        config=config,
        policy=config.policy if policy is None else policy_name(policy),
        layers=dict(recording.layers),
        steps=recording.steps,
        events=events,
        starting_ranks=starts,
        final_ranks={name: engine.ranks(name) for name in recording.layers},
        engine=engine,
    )


def why_no_cuts(recording: Recording, config: AllocatorConfig) -> str | None:
    """Say why a policy that cuts cannot be replayed from a recording; None if it can."""
    name, dimensions, run = config.policy, recording.dimensions, recording.config
    if dimensions is None:
        return (
            f"policy {name!r} needs the importance of every rank dimension, which only runs with "
            f"policy {name!r} record (or Recording.from_arrays(dimensions=...))"
        )
    if (recorded := dimensions.shape[2]) != config.r_max:
        return (
            f"the recording has {recorded} rank dimensions, r_max is {config.r_max}; replay policy "
            f"{name!r} with the recorded r_max"
        )
    if run is not None and run.cuts and run.policy != name:
        return (
            f"the run had other rank dimensions than policy {name!r} needs: it used policy "
            f"{run.policy!r}"
        )
    return None


def _drive(engine: AllocatorEngine, recording: Recording) -> Iterator[GrowthEvent]:
    """Feed every recorded step to the engine; yield the events."""
    config, layers = engine.config, recording.layers
    records = [recording.layer(name) for name in layers]
    cut_layers = layers if config.cuts else {}
    orders = {name: initial_order(size, config.r_max) for name, size in cut_layers.items()}
    for row in range(recording.steps):
        for record in records:
            if not record.presence[row]:
                engine.skip(record.name)
                continue
            importance = record.importance_at(row)
            if config.cuts:
                ranks = engine.ranks(record.name)
                importance = read_dimensions(record, row, ranks, orders[record.name])
            engine.observe(record.name, routing=record.routing_at(row), importance=importance)
        if (event := engine.step()) is not None:
            yield event
            for name, cut in event.cut.items():
                orders[name] = follow(orders[name], cut)


def read_dimensions(
    record: LayerRecord, row: int, ranks: IntArray, order: IntArray
) -> FloatArray | None:
    """Return the importance of the dimensions that a replay has, in its numbering, [N, R].

    None if the step has none.

    Args:
        record: the layer.
        row: the step, counted from 0.
        ranks: of the replay, [N].
        order: which recorded dimension each of its dimensions is, [N, R] (drlora_core.pruning).

    Raises:
        StatisticError: the run did not have one of these dimensions.
    """
    if record.dimensions is None or record.importance_at(row) is None:
        return None
    sample: FloatArray = np.take_along_axis(record.dimensions[row], order, axis=1)
    missing = np.isnan(sample) & active_dimensions(ranks, sample.shape[1])
    if missing.any():
        expert, dimension = (int(number) for number in np.argwhere(missing)[0])
        raise StatisticError(
            f"layer {record.name!r}, step {row + 1}: dimension {int(order[expert, dimension])} of "
            f"expert {expert} was not recorded: the run did not have it, but this replay does"
        )
    return sample


def repeats_run(recording: Recording, result: Replay) -> bool:
    """Tell whether a replay used the run's own configuration and policy."""
    return result.config == recording.config and recording.policy in (result.policy, None)


def first_difference(
    recorded: tuple[GrowthEvent, ...], replayed: tuple[GrowthEvent, ...]
) -> str | None:
    """Describe the first difference between two lists of events; None if they are identical."""
    for ours, theirs in zip(recorded, replayed, strict=False):
        if (ours.step, ours.index, ours.unplaced) != (theirs.step, theirs.index, theirs.unplaced):
            return (
                f"event {ours.index} after step {ours.step} left {ours.unplaced} units, the other "
                f"is event {theirs.index} after step {theirs.step} and left {theirs.unplaced}"
            )
        for name in ours.ranks:
            for field, what in DECISIONS.items():
                one, two = (getattr(event, field).get(name) for event in (ours, theirs))
                if not np.array_equal(one, two):
                    index = tuple(int(number) for number in np.argwhere(one != two)[0])
                    return (
                        f"step {ours.step}, layer {name!r}, expert {index[0]}: {what} "
                        f"{one[index]} and {two[index]}"
                    )
    if len(recorded) != len(replayed):
        return f"{len(recorded)} events and {len(replayed)}"
    return None
