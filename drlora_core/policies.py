"""Growth policies: pure callables that spread a quota of rank units over experts.

A policy gets one :class:`AllocationRequest` and returns int64 growth per expert, ``[N]``. It must
keep ``0 <= growth <= request.limits`` and ``growth.sum() <= request.quota``; what it leaves over is
carried to the next event. :func:`drlora_core.testing.check_policy` tests a policy of your own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike

from drlora_core import saliency as equations
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import PolicyError, near_misses


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


FIRST_OFFER = 4
"""Units that ``rescored`` first offers to each expert; most take fewer."""
REQUEST_ARRAYS = ("ranks", "limits", "routing", "importance", "scale")


class Policy(Protocol):
    """Spreads ``request.quota`` units over the experts; pure, deterministic, no side effects.

    It returns the growth of each expert, int64 [N].
    """

    def __call__(self, request: AllocationRequest) -> IntArray: ...


def policy_name(policy: object) -> str:
    """Return the name of a callable: that of its function (in ``functools.partial``) or class."""
    inner = getattr(policy, "func", policy)
    return str(getattr(inner, "__name__", type(inner).__name__))


def walk(scores: FloatArray, request: AllocationRequest) -> IntArray:
    """Serve each expert up to its limit, in order of score descending, then rank, then index.

    Example:
        >>> from drlora_core.testing import make_request
        >>> request = make_request(quota=5, ranks=[1, 1, 1], limits=[2, 2, 2])
        >>> walk(np.array([0.1, 0.9, 0.5]), request).tolist()
        [1, 2, 2]
    """
    units = np.minimum(request.quota, request.limits.sum(axis=-1))
    order = first_experts(scores, request, int(units.max()))
    limits = request.limits.take(order)
    served_before = np.cumsum(limits, axis=-1) - limits
    growth = np.zeros_like(request.ranks)
    growth.put(order, np.clip(units[..., None] - served_before, 0, limits))
    return growth


def first_experts(scores: FloatArray, request: AllocationRequest, units: int) -> IntArray:
    """Return the experts that may get one of ``units`` units, best first, [..., at most units].

    Their order is that of :func:`walk`. Experts of a stack are numbered through all its layers; a
    layer with fewer open experts than others ends in closed ones.
    """
    open_, size = request.limits > 0, scores.shape[-1]
    num_open = open_.sum(axis=-1, keepdims=True)
    count = min(units, int(num_open.max()))
    if open_.ndim == 1:  # it is faster to leave out most before the sort
        kept = np.flatnonzero(open_)
        negated = -scores[kept]
        if 0 < count < kept.size:
            near = ~(negated > np.partition(negated, count - 1)[count - 1])
            kept, negated = kept[near], negated[near]
        negated = negated[None]
    else:
        kept, negated = np.arange(size), np.where(open_, -scores, np.inf)
    order: IntArray = np.argsort(negated, axis=1)  # the fast sort leaves ties in any order
    ordered = np.take_along_axis(negated, order[:, : count + 1], axis=1)
    tied = (ordered[:, 1:] == ordered[:, :-1]) & (np.arange(1, ordered.shape[1]) < num_open)
    tied = tied.any(axis=1)  # closed experts come last; their ties do not matter
    if tied.any():  # lexsort is stable, so the index breaks ties
        ranks = request.ranks.reshape(-1, size)[tied][:, kept]
        order[tied] = np.lexsort((ranks, negated[tied]), axis=1)
    places: IntArray = kept[order[:, :count]] + size * np.arange(len(order))[:, None]
    return places.reshape(*scores.shape[:-1], count)


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
    # taking the first `units` of all possible units by score, then rank, then index. An expert
    # whose first unit is not among the first `units` first units gets nothing.
    units = np.minimum(request.quota, request.limits.sum(axis=-1))
    growth = np.zeros_like(request.ranks)
    experts = np.atleast_2d(first_experts(request.saliency, request, int(units.max())))
    offered, width = FIRST_OFFER, experts.shape[1]
    while width:
        experts = experts[:, :width]
        arrays: dict[str, Any] = {
            name: getattr(request, name).take(experts) for name in REQUEST_ARRAYS
        }
        first = dataclasses.replace(request, quota=cast(Any, np.atleast_1d(units)), **arrays)
        taken = _take_best(first, experts, offered)
        if not ((taken >= offered) & (first.limits > offered)).any():
            growth.put(experts, taken)
            break
        # Some experts may want more. Those that got nothing do not come back.
        width = int(np.flatnonzero(taken.any(axis=0))[-1]) + 1
        offered = min(2 * offered, int(first.limits.max()))
    return growth


def _take_best(request: AllocationRequest, experts: IntArray, offered: int) -> IntArray:
    """Spread the quotas of a stack over the best of ``offered`` units of each expert, [L, N].

    ``experts`` are the numbers of the experts, [L, N], which break ties. If the offers do not reach
    for a quota, an expert with a larger limit takes all that it was offered, at least.
    """
    units = np.asarray(request.quota)
    extra = np.arange(offered)[:, None, None]
    scores = np.where(
        extra < request.limits, request.saliency_at(request.ranks + extra), -np.inf
    ).transpose(1, 2, 0)  # [L, N, offered]
    flat = scores.reshape(len(units), -1)
    places = np.clip(flat.shape[1] - units, 0, flat.shape[1] - 1)[:, None]
    # Not np.unique: its first call imports numpy.ma, which takes longer than the event.
    ordered = np.partition(flat, sorted(set(places.flat)), axis=1)
    last = np.take_along_axis(ordered, places, axis=1)[:, :, None]  # the lowest score that is taken
    growth: IntArray = (scores > last).sum(axis=2, dtype=np.int64)
    left = units - growth.sum(axis=1)
    layers, columns, extras = np.nonzero(scores == last)  # the units that tie for the last places
    ranks = request.ranks[layers, columns] + extras
    order = np.lexsort((experts[layers, columns], ranks, layers))
    layers, columns = layers[order], columns[order]
    number = np.arange(layers.size) - np.searchsorted(layers, layers)  # within its layer
    wins = number < left[layers]
    np.add.at(growth, (layers[wins], columns[wins]), 1)
    return growth


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


def check_callable(policy: object) -> None:
    """Refuse what was given as a policy of the user's own but cannot be called.

    Raises:
        PolicyError: it is a name, or no callable.
    """
    if isinstance(policy, str):
        known = [*GROWTH_POLICIES, "prune", "move"]
        if policy not in known:
            raise PolicyError(f"no policy {policy!r}; {near_misses(policy, known)}")
        raise PolicyError(
            f"policy takes a callable; name a built-in policy in the configuration: "
            f"AllocatorConfig(policy={policy!r})"
        )
    if policy is not None and not callable(policy):
        raise PolicyError(
            f"policy must be a callable that takes an AllocationRequest, got {policy!r}"
        )


def takes_stacks(policy: Policy) -> bool:
    """True for built-in policies that also take a stack: arrays [L, N] and a quota int64 [L]."""
    return any(policy is known for known in (greedy, rescored, uniform))


def stack_requests(
    request: AllocationRequest, quotas: ArrayLike, experts: slice = slice(None)
) -> AllocationRequest:
    """Cut a part of a request into L requests of N experts each, for a policy that takes stacks."""
    per_layer = np.asarray(quotas, dtype=np.int64)
    arrays = {
        name: getattr(request, name)[experts].reshape(per_layer.size, -1) for name in REQUEST_ARRAYS
    }
    return dataclasses.replace(request, quota=cast(Any, per_layer), **arrays)


def run_policy(policy: Policy, request: AllocationRequest, experts: str) -> IntArray:
    """Call a policy with read-only arrays and check its answer.

    A PolicyError uses ``experts``, such as ``layer 'model.layers.0'``, and the step to say where.
    """
    for name in REQUEST_ARRAYS:
        getattr(request, name).setflags(write=False)
    when = f"at step {request.step}" if request.step else "at the start"
    where = f"policy {policy_name(policy)!r} {when}, {experts}"
    try:
        growth = policy(request)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from error
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
                f"{where} gave expert {expert} growth {growth.flat[expert]}, {limit} "
                f"(accepted: 0 to {request.limits.flat[expert]})"
            )
    if (growth.sum(axis=-1) > request.quota).any():
        spent = growth.sum(axis=-1)
        raise PolicyError(f"{where} spent {spent} units of a quota of {request.quota}")
    return growth.astype(np.int64)
