"""Policies with other signals than f g.

Each is ``greedy`` or ``rescored`` of drlora_core with another signal. Two reasons to try them: with
a token-mean loss, g already contains the routing weights, so f g counts them about twice; and
newborn rank dimensions, whose sensitivity starts at 0, lower the mean g of an expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from drlora_core import AllocationRequest, Policy
from drlora_core.policies import greedy, rescored, walk
from drlora_core.profiles import STARTING_POLICIES, sieve
from drlora_core.saliency import importance_at_zero

Signal = Callable[[AllocationRequest], np.ndarray]


def importance_per_token(request: AllocationRequest) -> np.ndarray:
    """g / f; 0 for experts that no token visits."""
    visited = request.routing > 0.0
    return np.divide(
        request.importance, request.routing, out=np.zeros_like(request.importance), where=visited
    )


def importance_by_sqrt_routing(request: AllocationRequest) -> np.ndarray:
    """sqrt(f) g."""
    signal: np.ndarray = np.sqrt(request.routing) * request.importance
    return signal


def summed_importance(request: AllocationRequest) -> np.ndarray:
    """f g r: the sum over rank dimensions instead of the mean."""
    signal: np.ndarray = request.routing * request.importance * request.ranks
    return signal


def least_first(request: AllocationRequest) -> np.ndarray:
    """``greedy`` in reversed order: the least salient experts grow first."""
    return walk(-request.saliency, request)


def toward(final: Sequence[np.ndarray]) -> Policy:
    """Grow to given ranks in random order, with scope ``layer``; one array [N] a layer."""

    def allocate(request: AllocationRequest) -> np.ndarray:
        *_, layer = request.seed  # the number of the pool
        missing = np.minimum(final[layer] - request.ranks, request.limits)
        units = np.repeat(np.arange(missing.size), missing)
        count = min(request.quota, units.size)
        chosen = request.generator().choice(units, count, replace=False)
        return np.bincount(chosen, minlength=missing.size)

    return allocate


def probed(probe: Sequence[np.ndarray]) -> Policy:
    """``greedy``, with g at rank 0 by gradients measured before training instead of by f.

    With scope ``layer``; one array [N] a layer. An expert without rank has the importance that its
    gradient suggests where the others have theirs, as f does in the library.
    """

    def allocate(request: AllocationRequest) -> np.ndarray:
        *_, layer = request.seed  # the number of the pool
        known = request.ranks > 0
        share = importance_at_zero(probe[layer], request.importance, known, [known.size])
        importance = np.where(known, request.importance, share)
        return greedy(dataclasses.replace(request, importance=importance))

    return allocate


def with_signal(signal: Signal, policy: Policy) -> Policy:
    """Replace f g by another signal."""

    def allocate(request: AllocationRequest) -> np.ndarray:
        replaced = dataclasses.replace(
            request, routing=np.ones_like(request.routing), importance=signal(request)
        )
        return policy(replaced)

    allocate.__name__ = f"{getattr(policy, '__name__', 'policy')}_by_{signal.__name__}"
    return allocate


POLICIES: Mapping[str, Policy] = {
    "least_first": least_first,
    "per_token": with_signal(importance_per_token, greedy),
    "sqrt_f": with_signal(importance_by_sqrt_routing, greedy),
    "total_importance": with_signal(summed_importance, greedy),
    "rescored_per_token": with_signal(importance_per_token, rescored),
    "rescored_sqrt_f": with_signal(importance_by_sqrt_routing, rescored),
}
STARTING: Mapping[str, Policy] = {
    **STARTING_POLICIES,
    "hottest_eighth": partial(sieve, fraction=0.125),
}
"""Policies that choose the ranks before training."""
