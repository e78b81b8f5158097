"""A global quota under floors and ceilings of layers is spread as by plain loops."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from drlora_core import AllocationRequest, AllocatorConfig, PolicyError
from drlora_core.ema import IntArray
from drlora_core.policies import Policy, greedy, proportional, rescored
from drlora_core.pools import Pool, allocate, make_pools, stacks
from drlora_core.testing import make_request

NAMES, SIZES = ("a", "b", "c"), (2, 3, 3)
POOL = Pool(NAMES, SIZES)
LAYER_OF = [0, 0, 1, 1, 1, 2, 2, 2]


def wrapped(policy: Policy) -> Policy:
    """A policy as users write it, which is called for one layer after the other."""
    return functools.partial(policy)


def draw(seed: int) -> tuple[AllocationRequest, IntArray, IntArray]:
    """A request of three layers, with floors and ceilings of theirs."""
    generator = np.random.default_rng(seed)
    size = len(LAYER_OF)
    request = make_request(
        quota=int(generator.integers(0, 16)),
        ranks=generator.integers(0, 4, size),
        limits=generator.integers(0, 4, size),
        routing=generator.permutation(size) + generator.random(size),
        importance=generator.random(size) + 0.5,
        scale=np.repeat(generator.random(3) + 0.5, SIZES),
    )
    capacities = generator.integers(0, 9, 3)
    floors = np.minimum(generator.multinomial(request.quota, [0.1, 0.1, 0.1, 0.7])[:3], capacities)
    return request, floors, capacities


def one_at_a_time(
    request: AllocationRequest, units: int, room: Sequence[int], anew: bool
) -> IntArray:
    """Give units to the best expert that may have one; its score follows its rank if ``anew``."""
    growth, left = np.zeros_like(request.ranks), list(room)
    for _ in range(units):
        ranks = request.ranks + growth * anew
        scores = request.saliency_at(ranks)
        open_ = [i for i, n in enumerate(LAYER_OF) if growth[i] < request.limits[i] and left[n]]
        if not open_:
            break
        best = max(open_, key=lambda i: (scores[i], -ranks[i], -i))
        growth[best] += 1
        left[LAYER_OF[best]] -= 1
    return growth


def by_loops(
    request: AllocationRequest, floors: list[int], capacities: list[int], anew: bool
) -> list[int]:
    """The floor of each layer, then the rest of the quota."""
    growth = np.zeros_like(request.ranks)
    for number, floor in enumerate(floors):
        room = [floor if other == number else 0 for other in range(3)]
        growth += one_at_a_time(request, floor, room, anew)
    left = [
        most
        - sum(
            units for units, layer in zip(growth.tolist(), LAYER_OF, strict=True) if layer == number
        )
        for number, most in enumerate(capacities)
    ]
    rest = dataclasses.replace(
        request, ranks=request.ranks + growth, limits=request.limits - growth
    )
    growth += one_at_a_time(rest, request.quota - int(growth.sum()), left, anew)
    answer: list[int] = growth.tolist()
    return answer


@pytest.mark.parametrize(
    ("policy", "anew"),
    [(greedy, False), (rescored, True), (wrapped(greedy), False), (wrapped(rescored), True)],
    ids=["greedy", "rescored", "called by layer", "rescored by layer"],
)
@pytest.mark.parametrize("seed", range(40))
def test_floors_and_ceilings_are_those_of_loops(policy: Policy, anew: bool, seed: int) -> None:
    request, floors, capacities = draw(seed)
    expected = by_loops(request, floors.tolist(), capacities.tolist(), anew)
    assert allocate(policy, request, POOL, floors, capacities).tolist() == expected


def test_the_draws_have_ceilings_that_matter() -> None:
    """The reference without them differs often."""
    draws = [draw(seed) for seed in range(40)]
    capped = [by_loops(request, [0, 0, 0], room.tolist(), False) for request, _, room in draws]
    free = [by_loops(request, [0, 0, 0], [99, 99, 99], False) for request, _, _ in draws]
    floors = [by_loops(r, f.tolist(), room.tolist(), False) for r, f, room in draws]
    assert sum(map(operator.ne, capped, free)) > 10
    assert sum(map(operator.ne, capped, floors)) > 5


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_all_layers_stay_below_their_ceilings(seed: int) -> None:
    request, floors, capacities = draw(seed)
    growth = allocate(proportional, request, POOL, floors, capacities)
    totals = [growth[layer.experts].sum() for layer in POOL.split()]
    room = [int(request.limits[layer.experts].sum()) for layer in POOL.split()]
    most = np.minimum(room, capacities)
    assert (totals <= most).all()
    assert (totals >= np.minimum(floors, most)).all()
    assert sum(totals) == min(request.quota, most.sum())


def test_floors_end_with_the_quota() -> None:
    """Eleven units of floors, of a quota of four: the first layers have theirs."""
    request = make_request(4, [1] * 8, [3] * 8)
    expected = [3, 0, 1, 0, 0, 0, 0, 0]
    for policy in (greedy, wrapped(greedy)):
        found = allocate(policy, request, POOL, np.array([3, 4, 4]), np.array([9, 9, 9]))
        assert found.tolist() == expected


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "layer 'a'"),  # the floors of the layers
        (2, "layer 'b'"),
        (3, "layer 'c'"),
        (4, "3 layers"),
        (5, "layer 'c'"),  # which takes what is above its ceiling
        (6, "3 layers"),
    ],
)
def test_an_error_says_where_the_policy_was(number: int, name: str) -> None:
    calls = []

    def errs(request: AllocationRequest) -> Any:
        calls.append(request)
        if len(calls) == number:
            raise RuntimeError("no")
        return greedy(request)

    request = make_request(6, [1] * 8, [3] * 8, routing=[1, 1, 1, 1, 1, 9, 9, 9])
    floors, capacities = np.array([1, 1, 1]), np.array([9, 9, 2])
    with pytest.raises(PolicyError, match=f"at step 1, {name} failed: RuntimeError: no"):
        allocate(errs, request, POOL, floors, capacities)


def test_a_pool_is_of_a_layer_or_of_all() -> None:
    sizes = dict(zip(NAMES, SIZES, strict=True))
    one, two, three = make_pools(AllocatorConfig(), sizes)
    assert [pool.experts for pool in (one, two, three)] == [slice(0, 2), slice(2, 5), slice(5, 8)]
    assert [pool.describe() for pool in (one, two)] == ["layer 'a'", "layer 'b'"]
    (everything,) = make_pools(AllocatorConfig(scope="global"), sizes)
    assert everything == POOL
    assert everything.split() == [one, two, three]
    assert (everything.experts, everything.describe()) == (slice(0, 8), "3 layers")
    assert Pool(NAMES[1:], SIZES[1:], 2).split() == [two, three]
    assert make_pools(AllocatorConfig(scope="global"), {}) == []
    assert list(stacks([one, two, three])) == [
        (slice(0, 1), slice(0, 2)),
        (slice(1, 3), slice(2, 8)),
    ]
