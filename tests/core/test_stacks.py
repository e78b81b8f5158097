"""Policies that decide many layers at once decide what they decide for each layer alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import AllocationRequest
from drlora_core.policies import GROWTH_POLICIES, stack_requests, takes_stacks
from drlora_core.pools import Pool, layer_means, stacks
from drlora_core.testing import make_request
from tests import reference
from tests.core.comparison import assert_same_events, assert_same_state, build, feed
from tests.strategies import layers, make_samples, options, seeds, styles

STACKED = [name for name, policy in GROWTH_POLICIES.items() if takes_stacks(policy)]


@st.composite
def stacked(draw: st.DrawFn) -> tuple[AllocationRequest, list[AllocationRequest]]:
    """A stack with many ties, closed experts and different quotas, and the requests in it."""
    rows, size = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    generator = np.random.default_rng(draw(seeds))
    numbers = draw(st.sampled_from([[0.0, 0.5, 1.0], [0.01, 0.1, 1.0, 9.0], None]))
    most = draw(st.sampled_from([1, 5, 20]))

    def values() -> Any:
        shape = (rows, size)
        return generator.random(shape) if numbers is None else generator.choice(numbers, shape)

    arrays = {
        "ranks": generator.integers(1, 5, (rows, size)),
        "limits": generator.integers(0, most + 1, (rows, size)),
        "routing": values(),
        "importance": values(),
        "scale": generator.choice([0.5, 1.0], (rows, size)),
    }
    quotas = [int(generator.integers(0, row.sum() + 3)) for row in arrays["limits"]]
    gamma = draw(st.sampled_from([0.0, 0.5, 1.0, 1.7]))
    singles = [
        make_request(quota, gamma=gamma, **{name: value[row] for name, value in arrays.items()})
        for row, quota in enumerate(quotas)
    ]
    flat = {name: value.reshape(-1) for name, value in arrays.items()}
    return stack_requests(dataclasses.replace(singles[0], **flat), quotas), singles


@pytest.mark.parametrize("name", STACKED)
@given(stacked())
def test_a_stack_decides_like_slow_loops(
    name: str, requests: tuple[AllocationRequest, list[AllocationRequest]]
) -> None:
    stack, singles = requests
    growth = GROWTH_POLICIES[name](stack)
    assert growth.dtype == np.int64
    for row, single in zip(growth.tolist(), singles, strict=True):
        assert GROWTH_POLICIES[name](single).tolist() == row
        ranks, limits, quota = single.ranks.tolist(), single.limits.tolist(), single.quota
        if name == "greedy":
            assert reference.greedy(single.saliency.tolist(), ranks, limits, quota) == row
        elif name == "rescored":

            def saliency_at(ranks: Any, single: AllocationRequest = single) -> list[float]:
                scores: list[float] = single.saliency_at(np.array(ranks)).tolist()
                return scores

            assert reference.rescored(saliency_at, ranks, limits, quota) == row


sizes = st.lists(st.sampled_from([2, 5, 5, 5]), min_size=1, max_size=5)


@given(
    options(policies=tuple(STACKED), scopes=("layer", "global")),
    layers() | sizes.map(lambda found: {f"l{i}": size for i, size in enumerate(found)}),
    seeds,
    styles,
)
def test_layers_together_decide_like_layers_alone(
    options: dict[str, Any], layers: dict[str, int], seed: int, style: str
) -> None:
    """A callable of the user's gets one request per pool or layer, never a stack."""
    policy = GROWTH_POLICIES[options["policy"]]

    def alone(request: AllocationRequest) -> Any:
        assert request.ranks.ndim == 1
        return policy(request)

    samples = make_samples(options, layers, seed, style, options["growth_end"] + 1, skip_first=True)
    together, apart = build(options, layers), build(options, layers, policy=alone)
    assert_same_events(feed(together, samples), feed(apart, samples))
    assert_same_state(together.state_dict(), apart.state_dict())


def test_neighbors_of_one_size_are_stacked() -> None:
    pool = Pool(tuple("abcde"), (2, 2, 3, 2, 2))
    assert list(stacks(pool.split())) == [
        (slice(0, 2), slice(0, 4)),
        (slice(2, 3), slice(4, 7)),
        (slice(3, 5), slice(7, 11)),
    ]


@given(sizes, seeds)
def test_layer_means_are_those_of_each_layer_bit_for_bit(found: list[int], seed: int) -> None:
    found = [size * 61 for size in found]  # long enough for NumPy to sum in pairs
    layers = Pool(tuple(map(str, range(len(found)))), tuple(found)).split()
    values = np.random.default_rng(seed).random(sum(found))
    values[layers[0].experts] = 0.0
    means = layer_means(values, layers)
    for layer in layers:
        assert set(means[layer.experts].tolist()) == {float(values[layer.experts].mean()) or 1.0}


class Unhashable:
    """A policy may be any callable."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, request: AllocationRequest) -> Any:
        return GROWTH_POLICIES["greedy"](request)


def test_a_policy_need_not_be_hashable() -> None:
    given: dict[str, Any] = {"r_init": 1, "r_target": 2, "r_max": 3, "warmup_steps": 0}
    given |= {"growth_interval": 1, "growth_end": 1}
    engine = build(given, {"a": 2}, policy=Unhashable())
    engine.observe("a", routing=[0.9, 0.1], importance=[1.0, 1.0])
    assert engine.step() is not None
    assert engine.ranks("a").tolist() == [3, 1]
