"""Policy ``move``: rank goes from the least important dimensions to the most salient experts.

Both happen in one event (after ElaLoRA, arXiv 2504.00254), so the budget holds at every step.
Four rules keep rank from going back and forth:

- A unit moves only where it is worth more. A unit is worth the saliency S of its expert at the rank
  below it, so one that expert i gets at rank r is worth S_i(r), and one that expert j gives at rank
  r is worth S_j(r - 1). The first must exceed ``GAIN`` times the second.
- A unit moves only from an expert that ends with less to one that ends with more: in the exchange
  without the limits of this event, which is the goal. Otherwise, as long as ``max_growth`` holds
  back the most salient experts, others would get units that they give back later.
- An expert never gives and receives at one event. One that grew at the last event does not give.
- Each event may move less than the one before (:func:`drlora_core.timetable.moved_units`).

Shapes: N experts of a layer, R = r_max rank dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from drlora_core.ema import FloatArray, IntArray
from drlora_core.policies import AllocationRequest
from drlora_core.pruning import least_important

GAIN = 1.5
"""How many times its worth a unit must have where it goes: it loses what it has learned, and worths
are noisy. On the recorded run of a small model, half as many units went back as with 1.1."""


class Exchange(NamedTuple):
    """What an event does to a layer."""

    growth: IntArray  # units that experts receive, [N]
    cut: NDArray[np.bool_]  # dimensions that experts give, numbered as before the event, [N, R]


class Units(NamedTuple):
    """Units that experts may receive, in the order in which they are placed."""

    experts: IntArray  # [units]
    numbers: IntArray  # how many the expert gets before, [units]


def exchange(
    request: AllocationRequest,
    dimensions: FloatArray,
    may_give: NDArray[np.bool_],
    r_min: int,
    most: int,
) -> Exchange:
    """Place ``request.quota`` new units, and as many of ``most`` moved ones as the rules allow.

    Units are placed one at a time, with S recomputed after each (policy ``rescored``). What is cut
    are the least important dimensions of the experts that may give.

    Args:
        request: the experts of a layer, and the new units that it may grow by.
        dimensions: average s_j, float64 [N, R].
        may_give: False for experts that grew at the last event, bool [N].
        r_min: least rank that a cut may leave an expert.
        most: most units that may move.

    Example:
        >>> from drlora_core.testing import make_request
        >>> request = make_request(quota=0, ranks=[2, 2], limits=[2, 2], saliency=[0.9, 0.1])
        >>> averages = np.array([[3.0, 3.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0]])
        >>> growth, cut = exchange(request, averages, np.array([True, True]), r_min=1, most=2)
        >>> growth.tolist(), np.argwhere(cut).tolist()
        ([1, 0], [[1, 1]])
    """
    ranks, units = request.ranks, _in_order(request, dimensions.shape[1])
    new = _place(_within(units, request.limits), request.quota, ranks.size)
    everyone = np.ones_like(may_give)
    goal = _place_most(request, units.experts, everyone, r_min, int(ranks.sum()))
    possible = _within(units, np.maximum(np.minimum(request.limits, goal), new))
    may_give = may_give & (goal == 0)
    growth = _place_most(request, possible, may_give, r_min, most)
    moved, keep = int(growth.sum() - new.sum()), ranks
    if moved:
        keep = ranks - spare_units(request, growth, may_give, r_min)
    return Exchange(growth, least_important(dimensions, ranks, moved, keep))


def _in_order(request: AllocationRequest, r_max: int) -> Units:
    """All units up to ``r_max``, in the order in which policy ``rescored`` places them."""
    extra = np.arange(int(r_max - request.ranks.min()))[:, None]
    ranks = request.ranks + extra
    numbers, experts = np.nonzero(ranks < r_max)
    scores = request.saliency_at(np.minimum(ranks, r_max))[numbers, experts]
    order = np.lexsort((experts, ranks[numbers, experts], -scores))
    return Units(experts[order], numbers[order])


def _within(units: Units, limits: IntArray) -> IntArray:
    """Who gets the units, in order, without what an expert would get above its limit."""
    return units.experts[units.numbers < limits[units.experts]]


def _place(experts: IntArray, count: int, num_experts: int) -> IntArray:
    """Give the experts the first ``count`` units, [N]."""
    return np.bincount(experts[:count], minlength=num_experts)


def _place_most(
    request: AllocationRequest,
    experts: IntArray,
    may_give: NDArray[np.bool_],
    r_min: int,
    most: int,
) -> IntArray:
    """Place the quota and as many of ``most`` other units as experts can give, [N]."""
    # If n units can move, so can fewer: fewer experts receive, and the least of them is worth more.
    moved, too_many = 0, max(min(most, experts.size - request.quota), 0) + 1
    while too_many - moved > 1:
        middle = (moved + too_many) // 2
        growth = _place(experts, request.quota + middle, request.ranks.size)
        if spare_units(request, growth, may_give, r_min).sum() >= middle:
            moved = middle
        else:
            too_many = middle
    return _place(experts, request.quota + moved, request.ranks.size)


def spare_units(
    request: AllocationRequest, growth: IntArray, may_give: NDArray[np.bool_], r_min: int
) -> IntArray:
    """Count the units that each expert can give while others get ``growth``, int64 [N]."""
    receives = growth > 0
    last_worth = request.saliency_at(request.ranks + np.maximum(growth - 1, 0))[receives].min()
    most = np.where(may_give & ~receives, np.maximum(request.ranks - r_min, 0), 0)
    given = np.arange(1, most.max() + 1)[:, None]  # units, one after the other
    worth = request.saliency_at(np.maximum(request.ranks - given, 0))
    spare: IntArray = ((given <= most) & (GAIN * worth < last_worth)).sum(axis=0)
    return spare
