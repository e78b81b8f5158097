"""Candidates for a better allocation under the same budget, as policies of drlora_core.

Each is the paper's walk, or the one-unit-at-a-time ``rescored``, by another signal in place of
f * g. With a token-mean loss g already contains the routing mass, so f * g counts it about twice;
and the mean over an expert's dimensions is diluted by newborn ones, whose sensitivity starts at 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from drlora_core.ema import FloatArray, IntArray
from drlora_core.policies import AllocationRequest, Policy, greedy, rescored

Signal = Callable[[AllocationRequest], FloatArray]


def importance_per_token(request: AllocationRequest) -> FloatArray:
    """g / f: importance per unit of routing weight; 0 for experts that no token visits."""
    visited = request.routing > 0.0
    return np.divide(
        request.importance, request.routing, out=np.zeros_like(request.importance), where=visited
    )


def importance_by_sqrt_routing(request: AllocationRequest) -> FloatArray:
    """sqrt(f) * g: routing counts half."""
    signal: FloatArray = np.sqrt(request.routing) * request.importance
    return signal


def summed_importance(request: AllocationRequest) -> FloatArray:
    """f * g * r: the sum over an expert's rank dimensions, which newborn ones do not dilute."""
    signal: FloatArray = request.routing * request.importance * request.ranks
    return signal


def given(request: AllocationRequest) -> IntArray:
    """The ranks that stand in the place of g; for events whose quota they fit, no others."""
    return np.rint(request.importance).astype(np.int64) - request.ranks


def by(signal: Signal, policy: Policy) -> Policy:
    """A policy that sees another signal where it would see f * g."""

    def allocate(request: AllocationRequest) -> IntArray:
        replaced = dataclasses.replace(
            request, routing=np.ones_like(request.routing), importance=signal(request)
        )
        return policy(replaced)

    allocate.__name__ = f"{getattr(policy, '__name__', 'policy')}_by_{signal.__name__}"
    return allocate


POLICIES: Mapping[str, Policy] = {
    "per_token": by(importance_per_token, greedy),
    "sqrt_f": by(importance_by_sqrt_routing, greedy),
    "total_importance": by(summed_importance, greedy),
    "rescored_per_token": by(importance_per_token, rescored),
    "rescored_sqrt_f": by(importance_by_sqrt_routing, rescored),
}
