"""The steps of growth events (T_grow) and the rank units that each may place (Q, R, K)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import NamedTuple


def growth_steps(warmup_steps: int, growth_interval: int, growth_end: int) -> range:
    """T_grow: all t with warmup_steps < t <= growth_end and (t - warmup_steps) % interval == 0."""
    return range(warmup_steps + growth_interval, growth_end + 1, growth_interval)


def event_index(step: int, warmup_steps: int, growth_interval: int, growth_end: int) -> int | None:
    """Return k (from 1) if an event follows the update of this step, else None."""
    if not warmup_steps < step <= growth_end:
        return None
    index, remainder = divmod(step - warmup_steps, growth_interval)
    return None if remainder else index


def even_quota(event: int, num_events: int, budget: int) -> int:
    """Quota of event k = 1..K: floor(k R / K) - floor((k - 1) R / K). All quotas sum to R.

    Example:
        >>> [even_quota(k, 4, 10) for k in (1, 2, 3, 4)]
        [2, 3, 2, 3]
    """
    return event * budget // num_events - (event - 1) * budget // num_events


def cubic_total(event: int, num_events: int, start: int, target: int) -> int:
    """Total rank after event k of a pruning run, from ``start`` down to ``target``.

    target + (start - target) * (1 - k / K)^3, rounded down: the schedule of AdaLoRA
    (arXiv 2303.10512, eq. 12) between warmup_steps and growth_end.
    """
    return target + (start - target) * (num_events - event) ** 3 // num_events**3


def moved_units(event: int, num_events: int, share: float, total: int) -> int:
    """Most units that event k = 1..K of policy ``move`` moves: floor(share * total * (K-k+1)/K).

    ``total`` is the rank of the layer before the event. The share is taken as the decimal number
    that it prints as, so that floor is exact.

    Example:
        >>> [moved_units(k, 4, 0.2, 100) for k in (1, 2, 3, 4)]
        [20, 15, 10, 5]
    """
    return math.floor(Fraction(repr(share)) * total * (num_events - event + 1) / num_events)


class Timetable(NamedTuple):
    """When ranks grow, as shares of the training steps, and the rank that they grow from."""

    start: float
    """End of the warmup; events come after it."""
    end: float
    """No event comes later."""
    r_init: int | None = None
    """Rank of every expert at the start; None: half of r_target."""


TIMETABLES: Mapping[str, Timetable] = MappingProxyType(
    {
        "sprout": Timetable(0.05, 0.25, r_init=1),
        "early": Timetable(0.05, 0.25),
        "late": Timetable(0.1, 0.6),
    }
)
"""By name. ``sprout`` gives every expert a single rank dimension at first, since those that train
together from the first step end up nearly parallel (docs/results/why_growing.md); ``late`` is that
of the paper."""


def even_events(warmup_steps: int, last_step: int, events: int) -> tuple[int, int]:
    """Return ``growth_interval`` and ``growth_end`` of events at even intervals after the warmup.

    There are fewer events if there are fewer steps; ``growth_end`` is at most ``last_step``.
    """
    room = last_step - warmup_steps
    if room < 1:
        return 1, last_step
    events = min(events, room)
    interval = room // events
    return interval, warmup_steps + events * interval


def growth_cap(r_init: int, r_max: int, events: int) -> int:
    """Return the ``max_growth`` that takes an expert from r_init to r_max in all the events."""
    return max(-(-(r_max - r_init) // events), 1)
