"""The growth timetable of a layer, if limits leave nothing unplaced."""

from __future__ import annotations

import dataclasses

from drlora_core import timetable
from drlora_core.config import AllocatorConfig


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedEvent:
    """One event of one layer."""

    index: int
    step: int
    quota: int
    """Rank units placed (policy ``prune``: cut, negative)."""
    total: int
    """Total rank of the layer after the event."""
    mean: float
    """Mean rank of its experts after the event."""


def planned_events(config: AllocatorConfig, num_experts: int) -> list[PlannedEvent]:
    """Events of a layer of ``num_experts`` experts.

    With scope ``global`` this is the layer's even share.

    Example:
        >>> config = AllocatorConfig(r_init=2, r_target=4, r_max=8, warmup_steps=0,
        ...                          growth_interval=5, growth_end=10)
        >>> [(event.step, event.quota, event.total) for event in planned_events(config, 3)]
        [(5, 3, 9), (10, 3, 12)]
    """
    budget, total = num_experts * config.r_target, num_experts * config.starting_rank
    found = []
    for index, step in enumerate(config.growth_steps, 1):
        change = _change(config, num_experts, index, total, budget)
        total += change
        found.append(PlannedEvent(index, step, change, total, total / num_experts))
    return found


def _change(config: AllocatorConfig, experts: int, index: int, total: int, budget: int) -> int:
    if config.policy == "uniform":
        return 0
    if config.policy == "prune":
        start = experts * config.r_init
        return timetable.cubic_total(index, config.num_events, start, budget) - total
    if config.quota is not None:
        return min(config.quota, budget - total)
    return timetable.even_quota(
        index, config.num_events, experts * (config.r_target - config.r_init)
    )


def step_of_budget(config: AllocatorConfig, num_experts: int) -> int | None:
    """Step after which the budget is met: 0 if from the start, None if never."""
    target = num_experts * config.r_target
    if config.starting_rank == config.r_target:
        return 0
    met = [event.step for event in planned_events(config, num_experts) if event.total == target]
    return met[0] if met else None
