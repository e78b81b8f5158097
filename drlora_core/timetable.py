"""When growth events happen and how many rank units each may place (design: T_grow, Q, R, K)."""

from __future__ import annotations


def growth_steps(warmup_steps: int, growth_interval: int, growth_end: int) -> range:
    """T_grow: all t with warmup_steps < t <= growth_end, (t - warmup_steps) % interval == 0.

    Example:
        >>> list(growth_steps(warmup_steps=5, growth_interval=10, growth_end=30))
        [15, 25]
    """
    return range(warmup_steps + growth_interval, growth_end + 1, growth_interval)


def event_index(step: int, warmup_steps: int, growth_interval: int, growth_end: int) -> int | None:
    """Return k (from 1) if an event follows the update of this step, else None."""
    if not warmup_steps < step <= growth_end:
        return None
    index, remainder = divmod(step - warmup_steps, growth_interval)
    return None if remainder else index


def even_quota(event: int, num_events: int, budget: int) -> int:
    """Quota of event k = 1..K: floor(k R / K) - floor((k - 1) R / K); they sum to R exactly.

    Example:
        >>> [even_quota(k, 4, 10) for k in (1, 2, 3, 4)]
        [2, 3, 2, 3]
    """
    return event * budget // num_events - (event - 1) * budget // num_events


def cubic_total(event: int, num_events: int, start: int, target: int) -> int:
    """Total rank after event k of a pruning run, from ``start`` down to ``target``.

    target + (start - target) * (1 - k / K)^3, rounded down: the schedule of AdaLoRA
    (arXiv 2303.10512, eq. 12) without its own warm-up and tail, which the window gives.

    Example:
        >>> [cubic_total(k, 4, start=64, target=32) for k in (1, 2, 3, 4)]
        [45, 36, 32, 32]
    """
    return target + (start - target) * (num_events - event) ** 3 // num_events**3
