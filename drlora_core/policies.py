"""Growth policies: pure callables that spread a quota of rank units over experts.

A policy gets one :class:`AllocationRequest` and returns int64 growth per expert, ``[N]``. It must
keep ``0 <= growth <= request.limits`` and ``growth.sum() <= request.quota``; what it leaves over is
carried to the next event. :func:`drlora_core.testing.check_policy` tests a policy of your own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from drlora_core import saliency as equations
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import PolicyError


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AllocationRequest:
    """What a policy gets at one growth event. All arrays are read-only, over the same N experts.

    With scope ``layer`` these are the experts of one layer; with scope ``global`` the experts of
    all layers, one layer after the other, and ``scale`` makes their saliencies comparable.
    """

    step: int
    """Optimizer step of the event."""
    quota: int
    """Rank units to place, >= 0."""
    ranks: IntArray
    """Active rank of each expert before the event, int64 [N]."""
    limits: IntArray
    """Most units each expert may get: min(max_growth, r_max - r_i), int64 [N]."""
    routing: FloatArray
    """f, bias-corrected (1 where ablated), float64 [N]."""
    importance: FloatArray
    """g, bias-corrected (1 where ablated), float64 [N]."""
    gamma: float
    """Exponent of the rank penalty."""
    scale: FloatArray
    """What saliency is divided by: 1, or the layer's mean with scope ``global``, float64 [N]."""
    seed: tuple[int, ...]
    """Seeds :meth:`generator`: the configuration's seed, the step and the pool of experts."""

    def saliency_at(self, ranks: IntArray) -> FloatArray:
        """S that the experts would have at other ranks, float64 [N]."""
        scores = equations.saliency(self.routing, self.importance, ranks, self.gamma)
        return scores / self.scale

    @property
    def saliency(self) -> FloatArray:
        """S at the present ranks, float64 [N]."""
        return self.saliency_at(self.ranks)

    def generator(self) -> np.random.Generator:
        """Return a fresh random generator, the same at every call for the same event."""
        return np.random.default_rng(self.seed)


REQUEST_ARRAYS = ("ranks", "limits", "routing", "importance", "scale")


class Policy(Protocol):
    """Spreads ``request.quota`` units over the experts; pure, deterministic, no side effects.

    It returns the growth of each expert, int64 [N].
    """

    def __call__(self, request: AllocationRequest) -> IntArray: ...


def policy_name(policy: Policy) -> str:
    """Return the name of a policy: that of its function or class."""
    return str(getattr(policy, "__name__", type(policy).__name__))


def walk(scores: FloatArray, request: AllocationRequest) -> IntArray:
    """Serve each expert up to its limit, in order of score descending, then rank, then index.

    Example:
        >>> from drlora_core.testing import make_request
        >>> request = make_request(quota=5, ranks=[1, 1, 1], limits=[2, 2, 2])
        >>> walk(np.array([0.1, 0.9, 0.5]), request).tolist()
        [1, 2, 2]
    """
    eligible = np.flatnonzero(request.limits)
    scores, ranks = scores[eligible], request.ranks[eligible]
    order = np.argsort(-scores)  # the fast sort leaves ties in any order
    if (np.diff(scores[order]) == 0).any():
        order = np.lexsort((ranks, -scores))  # lexsort is stable, so the index breaks ties
    order = eligible[order]
    limits = request.limits[order]
    served_before = np.cumsum(limits) - limits
    growth = np.zeros_like(request.ranks)
    growth[order] = np.clip(request.quota - served_before, 0, limits)
    return growth


def greedy(request: AllocationRequest) -> IntArray:
    """Serve experts in one walk by saliency: the paper's allocation."""
    return walk(request.saliency, request)


def random(request: AllocationRequest) -> IntArray:
    """Serve experts in one walk in random order: a control with the same limits."""
    return walk(request.generator().random(request.ranks.size), request)


def rescored(request: AllocationRequest) -> IntArray:
    """Place one unit at a time and recompute the saliency after each.

    With ``use_routing=False, use_importance=False`` this is uniform growth: the same timetable
    with no preference.
    """
    # An expert's score never rises with its rank. So placing the best unit again and again equals
    # taking the first `quota` of all possible units by score, then rank, then index.
    units = int(min(request.quota, request.limits.sum()))
    if units == 0:
        return np.zeros_like(request.ranks)
    offered = np.arange(min(units, request.limits.max()))[:, None]
    ranks = request.ranks + offered
    scores = np.where(offered < request.limits, request.saliency_at(ranks), -np.inf)
    last = np.partition(scores, scores.size - units, axis=None)[scores.size - units]
    growth: IntArray = (scores > last).sum(axis=0, dtype=np.int64)
    rows, experts = np.nonzero(scores == last)  # the units that tie for the last places
    order = np.lexsort((experts, ranks[rows, experts]))[: units - int(growth.sum())]
    return growth + np.bincount(experts[order], minlength=growth.size)


def proportional(request: AllocationRequest) -> IntArray:
    """Give shares in proportion to S (equal ones if every S is 0), rounded by largest remainder.

    What exceeds an expert's limit is shared among the others.
    """
    growth, shares = np.zeros_like(request.ranks), np.zeros(request.ranks.size)
    left = int(min(request.quota, request.limits.sum()))
    eligible = request.limits > 0
    while eligible.any():
        weights = np.where(eligible, request.saliency, 0.0)
        if weights.sum() <= 0.0:
            weights = eligible.astype(np.float64)
        shares = left * (weights / weights.sum())
        full = eligible & (shares >= request.limits)
        if not full.any():
            break
        growth[full] = request.limits[full]
        left -= int(request.limits[full].sum())
        eligible &= ~full
    whole = np.where(eligible, np.floor(shares), 0.0).astype(np.int64)
    remainders = dataclasses.replace(
        request, quota=left - int(whole.sum()), limits=eligible.astype(np.int64)
    )
    # Rounding makes equal remainders (4/3 and 1/3, say) tie in spite of floating point error.
    return growth + whole + walk(np.round(shares - whole, 9), remainders)


def uniform(request: AllocationRequest) -> IntArray:
    """Grow nothing (static LoRA): every expert starts at r_target."""
    return np.zeros_like(request.ranks)


GROWTH_POLICIES: Mapping[str, Policy] = MappingProxyType(
    {policy.__name__: policy for policy in (greedy, rescored, proportional, uniform, random)}
)


def run_policy(policy: Policy, request: AllocationRequest, experts: str) -> IntArray:
    """Call a policy with read-only arrays and check its answer.

    A PolicyError uses ``experts``, such as ``layer 'model.layers.0'``, and the step to say where.
    """
    for name in REQUEST_ARRAYS:
        getattr(request, name).setflags(write=False)
    where = f"policy {policy_name(policy)!r} at step {request.step}, {experts}"
    try:
        growth = policy(request)
    except Exception as error:
        raise PolicyError(f"{where} failed: {type(error).__name__}: {error}") from error
    if not isinstance(growth, np.ndarray) or growth.dtype.kind not in "iu":
        kind = growth.dtype if isinstance(growth, np.ndarray) else type(growth).__name__
        raise PolicyError(f"{where} returned {kind}; return an integer array of growth per expert")
    if growth.shape != request.ranks.shape:
        raise PolicyError(f"{where} returned shape {growth.shape}, not {request.ranks.shape}")
    for wrong, limit in ((growth < 0, "below 0"), (growth > request.limits, "above its limit")):
        if wrong.any():
            expert = int(np.argmax(wrong))
            raise PolicyError(
                f"{where} gave expert {expert} growth {growth[expert]}, {limit} "
                f"(accepted: 0 to {request.limits[expert]})"
            )
    if growth.sum() > request.quota:
        raise PolicyError(f"{where} spent {growth.sum()} units of a quota of {request.quota}")
    return growth.astype(np.int64)
