"""What an event reads and gives, in cases small enough to follow by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import (
    AllocationRequest,
    AllocatorConfig,
    LayoutError,
    PolicyError,
    StatisticError,
    moving,
)
from drlora_core import state as states
from drlora_core.bounds import MOST_DIMENSIONS
from drlora_core.events import event_quota
from drlora_core.policies import GROWTH_POLICIES, check_callable, greedy, run_policy
from drlora_core.pools import Pool
from drlora_core.testing import make_request
from tests.core.comparison import build

EVERY_STEP: dict[str, Any] = {"warmup_steps": 0, "growth_interval": 1, "growth_end": 4}


def test_one_sample_is_enough_for_an_event() -> None:
    options = {"use_importance": False, "r_init": 1, "r_target": 5, "r_max": 8}
    engine = build(EVERY_STEP | options, {"a": 1})
    engine.observe("a", routing=[1.0], importance=None)
    engine.step()
    assert engine.ranks("a").tolist() == [2]


def test_the_pool_that_waits_is_named(caplog: pytest.LogCaptureFixture) -> None:
    engine = build(EVERY_STEP, {"a": 2, "b": 2})
    engine.observe("a", routing=[0.5, 0.5], importance=[1.0, 1.0])
    engine.skip("b")
    engine.step()
    assert "leaves the ranks of layer 'b' as they are" in caplog.text
    assert "'a'" not in caplog.text


@pytest.mark.parametrize(("scope", "name"), [("layer", "layer 'a'"), ("global", "2 layers")])
def test_the_pool_of_a_policy_that_errs_is_named(scope: Any, name: str) -> None:
    def too_much(request: AllocationRequest) -> Any:
        return np.full_like(request.limits, 9 if request.quota else 0)

    options = EVERY_STEP | {"scope": scope, "max_growth": 3, "layer_floor": 0.0}
    engine = build(options, {"a": 2, "b": 2}, policy=too_much)
    for layer in ("a", "b"):
        engine.observe(layer, routing=[0.5, 0.5], importance=[1.0, 1.0])
    with pytest.raises(PolicyError, match=f"at step 1, {name} gave expert 0 growth 9"):
        engine.step()


def test_layers_that_have_grown_stop_at_their_ceiling() -> None:
    """Four events of 4 units; expert 0 of the first layer would take 11 of them."""
    options = {"scope": "global", "layer_floor": 0.0, "layer_ceiling": 6, "max_growth": None}
    ranks = {"r_init": 1, "r_target": 5, "r_max": 12}
    engine = build(EVERY_STEP | options | ranks, {"a": 2, "b": 2})
    totals = []
    for _ in range(4):
        engine.observe("a", routing=[1.0, 0.0], importance=[1.0, 1.0])
        engine.observe("b", routing=[0.5, 0.5], importance=[1.0, 1.0])
        engine.step()
        totals.append([int(engine.ranks(name).sum()) for name in ("a", "b")])
    assert totals == [[6, 2], [10, 2], [12, 4], [12, 8]]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_pool_has_a_seed_of_its_own(scope: Any) -> None:
    seeds = []

    def note(request: AllocationRequest) -> Any:
        seeds.append((request.seed, request.quota))
        return np.zeros_like(request.limits)

    options = {"scope": scope, "seed": 7, "layer_floor": 0.0, "r_init": 1, "r_target": 5}
    engine = build(EVERY_STEP | options, {"a": 2, "b": 2}, policy=note)
    for name in ("a", "b"):
        engine.observe(name, routing=[0.5, 0.5], importance=[1.0, 1.0])
    engine.step()
    expected = [((7, 1, 0), 2), ((7, 1, 1), 2)] if scope == "layer" else [((7, 1, 0), 4)]
    assert [each for each in seeds if each[1]] == expected


@pytest.mark.parametrize(
    ("options", "quotas"),
    [
        ({"policy": "uniform"}, [0, 0, 0, 0]),
        ({"policy": "uniform", "quota": 3}, [0, 0, 0, 0]),
        ({"quota": 3}, [6, 6, 6, 6]),  # of two layers
        ({"r_init": 1, "r_target": 4}, [3, 4, 4, 4]),  # 5 x 3 units
    ],
)
def test_the_quota_of_an_event(options: dict[str, Any], quotas: list[int]) -> None:
    config = AllocatorConfig(**EVERY_STEP, **options)
    pool = Pool(("a", "b"), (2, 3))
    assert [event_quota(config, pool, index) for index in (1, 2, 3, 4)] == quotas


def moved_by(samples: list[list[float]]) -> list[list[int]]:
    """Ranks of two experts after each step, of which each may move everything."""
    options = {"policy": "move", "move_share": 1.0, "gamma": 0.0, "routing_decay": 0.0}
    ranks = {"r_init": 3, "r_target": 3, "r_max": 4, "r_min": 0, "max_growth": None}
    engine = build(EVERY_STEP | {"growth_end": 20} | options | ranks, {"a": 2})
    after = []
    for sample in samples:
        engine.observe("a", routing=sample, importance=np.ones((2, 4)))
        engine.step()
        after.append(engine.ranks("a").tolist())
    return after


def test_an_expert_gives_from_its_second_sample_after_growth_on() -> None:
    first, second = [9.0, 1.0], [1.0, 9.0]
    # At the first event a single sample is enough.
    assert moved_by([first]) == [[4, 2]]
    # Expert 0 grew at the first event, so it gives at the third at the earliest.
    assert moved_by([first, second, second]) == [[4, 2], [4, 2], [2, 4]]
    # Expert 1 grew at the third event, so it gives at the fifth at the earliest.
    after = moved_by([first, second, second, first, first])
    assert after == [[4, 2], [4, 2], [2, 4], [2, 4], [4, 2]]


def spare_by_hand(
    request: AllocationRequest, growth: list[int], may_give: list[bool], r_min: int
) -> list[int]:
    """Take units one after the other, as long as each is worth less than the last that is got."""

    def worth(expert: int, rank: int) -> float:
        return float(request.saliency_at(np.full(len(growth), max(rank, 0)))[expert])

    ranks = request.ranks.tolist()
    last = min(worth(i, ranks[i] + units - 1) for i, units in enumerate(growth) if units)
    spare = []
    for i, rank in enumerate(ranks):
        given = 0
        if may_give[i] and not growth[i]:
            while rank - given > r_min and moving.GAIN * worth(i, rank - given - 1) < last:
                given += 1
        spare.append(given)
    return spare


@given(st.data(), st.integers(2, 5), st.sampled_from([0, 1, 2]))
def test_what_experts_can_spare_is_counted_unit_by_unit(
    data: st.DataObject, size: int, r_min: int
) -> None:
    def draw(values: Any) -> Any:
        return data.draw(st.lists(values, min_size=size, max_size=size))

    growth = draw(st.integers(0, 3))
    growth[data.draw(st.integers(0, size - 1))] += 1
    ranks, may_give = draw(st.integers(0, 4)), draw(st.booleans())
    routing = draw(st.sampled_from([0.0, 0.1, 0.3, 1.0, 4.0]))
    request = make_request(0, ranks, [9] * size, routing=routing, gamma=1.0)
    found = moving.spare_units(request, np.array(growth), np.array(may_give), r_min)
    assert found.tolist() == spare_by_hand(request, growth, may_give, r_min)


@pytest.mark.parametrize(
    ("ranks", "routing", "growth", "r_min", "spare"),
    [
        # Two units are got, of worth 6/2 and 6/3; that of the other is worth 1.5.
        ([1, 1], [6.0, 1.5], [2, 0], 0, [0, 0]),
        ([1, 1], [6.0, 1.5], [1, 0], 0, [0, 1]),
        ([0, 1], [6.0, 1.5], [1, 0], 0, [0, 1]),
        ([1, 1], [3.0, 1.5], [1, 0], 0, [0, 0]),  # 1.5 times 1.5 is more than 3/2
        ([1, 3], [3.0, 1.5], [1, 0], 1, [0, 2]),
    ],
)
def test_what_is_spared(
    ranks: list[int], routing: list[float], growth: list[int], r_min: int, spare: list[int]
) -> None:
    request = make_request(0, ranks, [9, 9], routing=routing, gamma=1.0)
    found = moving.spare_units(request, np.array(growth), np.array([True, True]), r_min)
    assert found.tolist() == spare
    assert spare_by_hand(request, growth, [True, True], r_min) == spare


def test_nothing_moves_where_there_is_no_room() -> None:
    request = make_request(3, [2, 2], [0, 0], routing=[9.0, 1.0])
    growth, cut = moving.exchange(request, np.ones((2, 2)), np.array([True, True]), 0, most=2)
    assert not growth.any()
    assert not cut.any()


def test_experts_without_rank_have_the_importance_of_their_share() -> None:
    """Of the others, 4 of g are for 0.75 of f; those keep what was measured."""
    options = {"r_init": 0, "r_target": 4, "r_max": 8, "warmup_steps": 9, "growth_end": 99}
    engine = build(options | {"growth_interval": 9}, {})
    engine.add_layer("a", 3, ranks=[1, 1, 0])
    for _ in range(3):
        engine.observe("a", routing=[0.5, 0.25, 0.25], importance=[3.0, 1.0, 7.0])
        engine.step()
    np.testing.assert_allclose(engine.saliency("a"), [0.75, 0.125, 1 / 3], rtol=1e-12)


def test_greedy_gives_nothing_without_a_quota() -> None:
    assert greedy(make_request(0, [1, 1], [2, 2])).tolist() == [0, 0]


def test_shares_of_importance_are_those_of_each_layer() -> None:
    """An event looks at all layers together; here the second has eight times the importance."""
    options = {"r_init": 0, "r_target": 4, "r_max": 8} | EVERY_STEP
    engine = build(options, {})
    for name in ("a", "b"):
        engine.add_layer(name, 3, ranks=[1, 1, 0])
    for name, worth in (("a", [2.0, 1.0, 7.0]), ("b", [16.0, 8.0, 7.0])):
        engine.observe(name, routing=[0.5, 0.25, 0.25], importance=worth)
    before = {name: engine.saliency(name).tolist() for name in ("a", "b")}
    np.testing.assert_allclose(before["a"], [0.5, 0.125, 0.25], rtol=1e-12)
    np.testing.assert_allclose(before["b"], [4.0, 1.0, 2.0], rtol=1e-12)
    event = engine.step()
    assert event is not None
    assert {name: of.tolist() for name, of in event.saliency.items()} == before


def test_what_has_no_rank_is_not_averaged() -> None:
    engine = build({"r_init": 0, "r_target": 4, "r_max": 8}, {})
    engine.add_layer("a", 2, ranks=[1, 0])
    engine.observe("a", routing=[0.5, 0.5], importance=[2.0, np.nan])
    arrays = engine.state_dict()["layers"]["a"]
    assert arrays["importance"][1] == 0.0
    assert list(arrays["importance_count"]) == [1, 0]


@pytest.mark.parametrize("importance", [1.0, [1.0], [1.0] * 3], ids=str)
def test_without_rank_a_sample_needs_its_shape_too(importance: Any) -> None:
    engine = build({"r_init": 0, "r_target": 4, "r_max": 8}, {"a": 2})
    with pytest.raises(StatisticError, match=r"importance has shape \(.*; accepted: \(2,\) or"):
        engine.observe("a", routing=[0.5, 0.5], importance=importance)


def test_the_largest_numbers_are_accepted() -> None:
    engine = build({}, {"a": 2})
    engine.observe("a", routing=[0.5, 0.5], importance=[states.LARGEST, 0.0])
    assert np.isfinite(engine.saliency("a")).all()


@pytest.mark.parametrize("policy", ["prune", "move"])
def test_as_many_dimensions_as_fit_are_accepted(policy: Any) -> None:
    r_init = 8 if policy == "prune" else 2
    config = AllocatorConfig(policy=policy, r_init=r_init, r_target=4, r_max=8)
    most = MOST_DIMENSIONS // config.r_max
    states.check_dimensions(config, most)
    with pytest.raises(LayoutError, match=f"stores the importance of {most + 1} experts"):
        states.check_dimensions(config, most + 1)
    states.check_dimensions(AllocatorConfig(), most + 1)  # stores no dimensions


def test_a_policy_that_errs_is_told_where() -> None:
    def too_much(request: AllocationRequest) -> Any:
        return np.array([0, 0, 5])

    with pytest.raises(PolicyError, match=r"gave expert 2 growth 5, above its limit .*0 to 2"):
        run_policy(too_much, make_request(9, [1, 1, 1], [2, 2, 2]), "layer 'a'")


@pytest.mark.parametrize("name", [*GROWTH_POLICIES, "prune", "move"])
def test_the_name_of_a_policy_is_no_callable(name: str) -> None:
    with pytest.raises(PolicyError, match=f"in the configuration: .*policy={name!r}"):
        check_callable(name)


def test_averages_of_what_grew_or_was_emptied_start_anew() -> None:
    config = AllocatorConfig(policy="move", r_init=2, r_target=2, r_max=3, r_min=0)
    state = states.make_state(config, {"a": np.array([2, 2]), "b": np.array([1, 0])})
    assert state.dimensions is not None
    state.dimensions[:] = [[3.0, 2.0, 0.0], [4.0, 5.0, 0.0], [6.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    state.importance[:], state.importance_count[:] = [2.5, 4.5, 6.0, 0.0], [3, 4, 5, 0]
    state.routing[:] = [0.5, 0.5, 0.75, 0.25]

    def content(state: states.State) -> list[Any]:
        assert state.dimensions is not None
        arrays = (state.ranks, state.importance, state.importance_count, state.dimensions)
        assert state.routing.tolist() == [0.5, 0.5, 0.75, 0.25]
        return [array.tolist() for array in arrays]

    assert content(states.grow(state, np.array([0, 1, 0, 2]))) == [
        [2, 3, 1, 2],
        [2.5, 0.0, 6.0, 0.0],
        [3, 0, 5, 0],
        [[3.0, 2.0, 0.0], [0.0] * 3, [6.0, 0.0, 0.0], [0.0] * 3],
    ]
    marked = np.zeros((4, 3), dtype=np.bool_)
    marked[0, 0] = marked[2, 0] = True
    assert content(states.cut(state, marked)) == [
        [1, 2, 0, 0],
        [2.5, 4.5, 0.0, 0.0],
        [3, 4, 0, 0],
        [[2.0, 0.0, 0.0], [4.0, 5.0, 0.0], [0.0] * 3, [0.0] * 3],
    ]
