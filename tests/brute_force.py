"""The best of all allocations and cuts, found by listing them: for a handful of experts only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence


def all_allocations(limits: Sequence[int], quota: int) -> Iterator[tuple[int, ...]]:
    """Every allocation that keeps the limits and the quota."""
    for growth in itertools.product(*(range(limit + 1) for limit in limits)):
        if sum(growth) <= quota:
            yield growth


def brute_force_greedy(
    scores: Sequence[float], ranks: Sequence[int], limits: Sequence[int], quota: int
) -> list[int]:
    """Of all feasible allocations the one that gives most to the first in order, then the next."""
    order = sorted(range(len(ranks)), key=lambda i: (-scores[i], ranks[i], i))
    by_priority = {tuple(g[i] for i in order): g for g in all_allocations(limits, quota)}
    return list(by_priority[max(by_priority)])


def brute_force_prune(
    scores: Sequence[Sequence[float]], ranks: Sequence[int], count: int
) -> set[tuple[int, int]]:
    """Of all cuts that leave every expert one dimension, the one that loses least importance."""
    active = [(i, j) for i, r in enumerate(ranks) for j in range(r)]
    cuts = (
        set(cut)
        for cut in itertools.combinations(active, count)
        if all(sum(i == e for e, _ in cut) < r for i, r in enumerate(ranks))
    )
    return min(cuts, key=lambda cut: math.fsum(scores[i][j] for i, j in cut))
