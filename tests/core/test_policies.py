"""Properties of the built-in policies, in both scopes, and their agreement with slow loops."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from drlora_core import AllocationRequest, AllocatorConfig, AllocatorEngine, policies, pruning
from drlora_core.policies import GROWTH_POLICIES
from drlora_core.testing import check_policy, make_request
from tests import brute_force, reference
from tests.core.comparison import build, feed
from tests.strategies import GROWTH_POLICIES as GROWING
from tests.strategies import layers, make_samples, options, seeds, styles


@st.composite
def requests(draw: st.DrawFn, experts: int = 8, most: int = 5) -> AllocationRequest:
    """Requests with many ties: scores from a small grid, or any floats."""
    size = draw(st.integers(1, experts))

    def each(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=size, max_size=size))

    value = draw(st.sampled_from([st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 9.0, width=32)]))
    limits = each(st.integers(0, most))
    return make_request(
        draw(st.integers(0, sum(limits) + 2)),
        each(st.integers(1, 4)),
        limits,
        routing=each(value),
        importance=each(value),
        gamma=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        seed=[draw(seeds)],
    )


@pytest.mark.parametrize("name", GROWTH_POLICIES)
def test_built_in_policies_keep_the_contract(name: str) -> None:
    check_policy(GROWTH_POLICIES[name], equivariant=name != "random", examples=100)


@pytest.mark.parametrize("name", GROWING)
@given(request=requests())
def test_everything_that_limits_allow_is_placed(name: str, request: AllocationRequest) -> None:
    growth = GROWTH_POLICIES[name](request)
    assert growth.sum() == min(request.quota, request.limits.sum())


@given(requests(experts=4, most=3))
def test_greedy_is_the_first_of_all_feasible_allocations(request: AllocationRequest) -> None:
    arguments = (request.saliency.tolist(), request.ranks.tolist(), request.limits.tolist())
    best = brute_force.brute_force_greedy(*arguments, request.quota)
    assert policies.greedy(request).tolist() == best
    assert reference.greedy(*arguments, request.quota) == best


@given(requests())
def test_rescored_is_greedy_unit_by_unit(request: AllocationRequest) -> None:
    def saliency_at(ranks: Sequence[int]) -> list[float]:
        return [float(score) for score in request.saliency_at(np.array(ranks))]

    expected = reference.rescored(
        saliency_at, request.ranks.tolist(), request.limits.tolist(), request.quota
    )
    assert policies.rescored(request).tolist() == expected


@given(requests())
def test_proportional_is_largest_remainder_in_exact_fractions(request: AllocationRequest) -> None:
    expected, undecided = reference.proportional(
        request.saliency.tolist(), request.ranks.tolist(), request.limits.tolist(), request.quota
    )
    assume(not undecided)
    assert policies.proportional(request).tolist() == expected


def test_equal_remainders_tie_although_floats_differ() -> None:
    """Shares 4/3, 4/3 and 1/3 of a quota of 3: the unit left over goes to the first expert."""
    request = make_request(3, [1, 1, 3], [3, 3, 3], saliency=[4.0, 4.0, 1.0])
    assert policies.proportional(request).tolist() == [2, 1, 0]
    nearly = make_request(1, [1, 1], [5, 5], saliency=[1.0, 1.0 + 4e-10])
    assert policies.proportional(nearly).tolist() == [1, 0]


@given(requests())
def test_proportional_is_within_one_unit_of_the_share(request: AllocationRequest) -> None:
    scores = request.saliency + 0.125
    roomy = np.full_like(request.limits, request.quota)
    wide = make_request(request.quota, request.ranks, roomy, saliency=scores)
    share = wide.quota * scores / scores.sum()
    assert (np.abs(policies.proportional(wide) - share) < 1 + 1e-9).all()


@given(requests(), st.integers(0, 7), st.floats(1.0, 10.0))
@pytest.mark.parametrize("name", ["greedy", "rescored", "proportional"])
def test_a_higher_score_never_gets_less(
    name: str, request: AllocationRequest, expert: int, factor: float
) -> None:
    policy = GROWTH_POLICIES[name]
    expert %= request.ranks.size
    before = policy(request)[expert]
    routing = request.routing.copy()
    routing[expert] *= factor
    fields = {key: getattr(request, key) for key in ("ranks", "limits", "importance", "gamma")}
    raised = make_request(request.quota, routing=routing, **fields)
    slack = 1 if name == "proportional" else 0  # rounding: others' remainders change as well
    assert policy(raised)[expert] >= before - slack


@given(requests())
def test_with_equal_limits_greedy_serves_the_higher_score_first(
    request: AllocationRequest,
) -> None:
    limits = np.full_like(request.limits, 3)
    scores = request.saliency
    growth = policies.greedy(make_request(request.quota, request.ranks, limits, saliency=scores))
    for one in range(scores.size):
        for other in range(scores.size):
            if scores[one] > scores[other]:
                assert growth[one] >= growth[other]


def test_ties_go_to_the_smaller_rank_then_the_smaller_index() -> None:
    request = make_request(3, [2, 1, 1], [2, 2, 2], saliency=[0.5, 0.5, 0.5])
    assert policies.greedy(request).tolist() == [0, 2, 1]


def test_random_depends_on_the_seed_and_on_nothing_else() -> None:
    def order(seed: int, scores: list[float]) -> list[int]:
        request = make_request(4, [1] * 8, [1] * 8, saliency=scores, seed=[seed])
        return [int(units) for units in policies.random(request)]

    up = [float(i) for i in range(8)]
    for seed in range(5):
        assert order(seed, up) == order(seed, up[::-1])
    assert len({tuple(order(seed, up)) for seed in range(20)}) > 10


def test_uniform_starts_at_the_budget_and_stays() -> None:
    given: dict[str, Any] = {
        "r_init": 1,
        "r_target": 3,
        "r_max": 5,
        "warmup_steps": 0,
        "growth_interval": 1,
    }
    given |= {"growth_end": 3, "policy": "uniform"}
    engine = build(given, {"a": 4})
    events = feed(engine, make_samples(given, {"a": 4}, 0, "generic", 4))
    assert [event.deltas["a"].tolist() for event in events if event] == [[0, 0, 0, 0]] * 3
    assert engine.ranks("a").tolist() == [3, 3, 3, 3]


@given(st.data(), st.integers(1, 3), st.integers(1, 4))
def test_prune_cuts_what_loses_least(data: st.DataObject, experts: int, r_max: int) -> None:
    ranks = data.draw(st.lists(st.integers(1, r_max), min_size=experts, max_size=experts))
    count = data.draw(st.integers(0, sum(ranks) - experts))
    scores = np.random.default_rng(data.draw(seeds)).random((experts, r_max))
    cut = pruning.least_important(scores, np.array(ranks), count)
    expected = brute_force.brute_force_prune(scores.tolist(), ranks, count)
    assert set(zip(*map(np.ndarray.tolist, np.nonzero(cut)), strict=True)) == expected


@given(st.data(), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 0.5]))
def test_prune_meets_the_count_when_all_scores_tie(
    data: st.DataObject, experts: int, r_max: int, score: float
) -> None:
    ranks = np.array(data.draw(st.lists(st.integers(1, r_max), min_size=experts, max_size=experts)))
    count = data.draw(st.integers(0, int(ranks.sum()) - experts))
    cut = pruning.least_important(np.full((experts, r_max), score), ranks, count)
    assert cut.sum() == count
    assert (ranks - cut.sum(axis=1) >= 1).all()
    assert not cut[np.arange(r_max) >= ranks[:, None]].any()


@given(options(policies=("prune",), scopes=("layer", "global")), layers(), seeds, styles)
def test_prune_ends_exactly_at_the_budget(
    options: dict[str, Any], layers: dict[str, int], seed: int, style: str
) -> None:
    engine = build(options, layers)
    samples = make_samples(options, layers, seed, style, options["growth_end"])
    totals = [sum(layers.values()) * options["r_init"]]
    for event in feed(engine, samples):
        if event is not None:
            totals.append(sum(int(ranks.sum()) for ranks in event.ranks.values()))
            assert all((ranks >= options["r_min"]).all() for ranks in event.ranks.values())
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == sum(layers.values()) * options["r_target"]
    if options["scope"] == "layer":
        assert all(engine.ranks(name).sum() == engine.budget(name) for name in layers)


def test_prune_compares_layers_by_their_bias_corrected_importance() -> None:
    """A layer that skipped steps has a smaller raw average, not less important dimensions."""
    given: dict[str, Any] = {
        "r_init": 2,
        "r_target": 1,
        "r_max": 2,
        "warmup_steps": 0,
        "growth_interval": 2,
    }
    given |= {"growth_end": 4, "policy": "prune", "scope": "global"}
    engine = build(given, {"seen once": 2, "seen twice": 2})
    ones = np.ones((2, 2))
    engine.observe("seen once", routing=[1, 1], importance=2 * ones)
    engine.observe("seen twice", routing=[1, 1], importance=1.9 * ones)
    engine.step()
    engine.skip("seen once")
    engine.observe("seen twice", routing=[1, 1], importance=1.9 * ones)
    event = engine.step()
    assert event is not None
    assert event.deltas["seen twice"].tolist() == [-1, -1]
    assert event.deltas["seen once"].sum() == -2  # 8 -> 4 + 4 * (1/2)^3 = 4: two cuts each


@given(options(policies=GROWING, scopes=("global",)), layers(), seeds, styles)
def test_global_scope_keeps_budget_floors_and_ceilings(
    options: dict[str, Any], layers: dict[str, int], seed: int, style: str
) -> None:
    engine = build(options, layers)
    ceiling, total = engine.config.mean_rank_ceiling, sum(layers.values())
    ranks = {name: engine.ranks(name) for name in layers}
    samples = make_samples(options, layers, seed, style, options["growth_end"] + 1)
    for event in feed(engine, samples):
        if event is None:
            continue
        floors = layer_floors(engine.config, layers, event.index)
        placed = sum(int(delta.sum()) for delta in event.deltas.values())
        for name, size in layers.items():
            before, delta = ranks[name], event.deltas[name]
            assert (delta >= 0).all()
            assert (delta <= (options["max_growth"] or options["r_max"])).all()
            assert event.ranks[name].max() <= options["r_max"]
            assert event.ranks[name].sum() <= size * ceiling
            room = np.minimum(options["r_max"] - before, options["max_growth"] or options["r_max"])
            least = min(floors[name], size * ceiling - before.sum(), room.sum())
            quota = placed + event.unplaced
            if sum(floors.values()) <= quota:  # else rounding, or a budget that is used up
                assert delta.sum() >= least
            ranks[name] = event.ranks[name]
        assert sum(r.sum() for r in ranks.values()) <= total * options["r_target"]
    if options["quota"] is None and options["max_growth"] is None:
        assert sum(r.sum() for r in ranks.values()) == total * options["r_target"]


def layer_floors(config: AllocatorConfig, layers: dict[str, int], index: int) -> dict[str, int]:
    """The share of its own even (or fixed) quota that each layer gets in any case."""

    def fresh(size: int) -> int:
        if config.quota is not None:
            return config.quota
        budget = size * (config.r_target - config.r_init)
        return index * budget // config.num_events - (index - 1) * budget // config.num_events

    return {name: int(config.layer_floor * fresh(size)) for name, size in layers.items()}


@given(
    options(policies=("greedy",), scopes=("global",)),
    layers(),
    seeds,
    st.sampled_from([1, 7, None]),
)
def test_global_greedy_without_bounds_is_one_walk_by_relative_saliency(
    options: dict[str, Any], layers: dict[str, int], seed: int, quota: int | None
) -> None:
    options |= {"layer_floor": 0.0, "layer_ceiling": options["r_max"], "quota": quota}
    options |= {"warmup_steps": 0, "growth_interval": 1, "growth_end": 4}
    engine = build(options, layers)
    sample = make_samples(options, layers, seed, "generic", 1)
    (event,) = feed(engine, sample)
    assert event is not None
    scores: list[float] = []
    for name in layers:
        own = event.saliency[name].tolist()
        mean = sum(own) / len(own)
        scores += [value / mean if mean else value for value in own]
    assume(not reference.near_tie(scores))
    size = sum(layers.values())
    missing = size * (options["r_target"] - options["r_init"])
    fresh = missing // 4 if quota is None else quota * len(layers)
    limit = options["r_max"] - options["r_init"]
    limits = [min(limit, options["max_growth"] or limit)] * size
    expected = reference.greedy(scores, [options["r_init"]] * size, limits, min(fresh, missing))
    assert [delta for name in layers for delta in event.deltas[name].tolist()] == expected


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("policy", GROWING)
@pytest.mark.parametrize(("quota", "total"), [(1, None), (50, 2 * 3 * 4)])
def test_fixed_quota_falls_short_or_stops_at_the_budget(
    scope: str, policy: str, quota: int, total: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Two layers of three experts from rank 1 to a mean of 4 in five events."""
    given: dict[str, Any] = {
        "r_init": 1,
        "r_target": 4,
        "r_max": 8,
        "warmup_steps": 2,
        "growth_interval": 2,
    }
    given |= {"growth_end": 12, "quota": quota, "policy": policy, "scope": scope}
    sizes = {"a": 3, "b": 3}
    with caplog.at_level(logging.WARNING):
        engine = build(given, sizes)
    short = total is None
    assert caplog.text.count("quota 1 x 5 events = 5 < 9 needed") == (2 if short else 0)
    events = [e for e in feed(engine, make_samples(given, sizes, 5, "generic", 14)) if e]
    ends = [sum(int(ranks.sum()) for ranks in event.ranks.values()) for event in events]
    assert max(ends) <= 2 * 3 * 4
    assert ends[-1] == (6 + 5 * 2 * quota if short else total)
    if scope == "layer":
        assert all(engine.ranks(name).sum() <= 3 * 4 for name in sizes)


def test_what_limits_leave_over_is_carried_to_the_next_event() -> None:
    """Quotas 3, 3, 3; at one unit each two experts take 2, 2, 2 and the rest stays unplaced."""
    given: dict[str, Any] = {
        "r_init": 1,
        "r_target": 4,
        "r_max": 9,
        "warmup_steps": 0,
        "growth_interval": 1,
    }
    given |= {"growth_end": 3, "quota": 3, "max_growth": 1}
    engine = build(given, {"a": 2})
    samples = make_samples(given | {"policy": "greedy"}, {"a": 2}, 0, "generic", 3)
    events = feed(engine, samples)
    assert [(e.deltas["a"].tolist(), e.unplaced) for e in events if e] == [
        ([1, 1], 1),  # 3 - 2
        ([1, 1], 2),  # 1 + 3 - 2, at most 6 - 2 - 2
        ([1, 1], 0),  # 2 + 3, at most the 2 that the budget still has
    ]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("policy", GROWING)
def test_no_budget_is_spent_before_a_sample_has_been_seen(
    policy: str, scope: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first event waits and carries its units over; the next has samples and places both."""
    config = AllocatorConfig(
        r_init=1,
        r_target=3,
        r_max=9,
        warmup_steps=0,
        growth_interval=1,
        growth_end=2,
        policy=policy,
        scope=scope,
    )
    engine = AllocatorEngine(config)
    engine.add_layer("a", 4)
    engine.skip("a")
    waiting = engine.step()
    assert waiting is not None
    assert engine.ranks("a").tolist() == [1] * 4
    assert (waiting.deltas["a"].tolist(), waiting.unplaced) == ([0] * 4, 4)
    assert "no sample of routing or importance has been seen" in caplog.text
    resumed = AllocatorEngine(config)
    resumed.load_state_dict(engine.state_dict())
    for each in (engine, resumed):
        each.observe("a", routing=[0.4, 0.3, 0.2, 0.1], importance=[1.0] * 4)
        event = each.step()
        assert event is not None
        assert event.unplaced == 0
        assert each.ranks("a").sum() == 12


def test_nothing_is_pruned_before_a_sample_has_been_seen() -> None:
    config = AllocatorConfig(
        r_init=4,
        r_target=2,
        r_max=4,
        warmup_steps=0,
        growth_interval=1,
        growth_end=2,
        policy="prune",
    )
    engine = AllocatorEngine(config)
    engine.add_layer("a", 3)
    engine.skip("a")
    waiting = engine.step()
    assert waiting is not None
    assert not waiting.cut["a"].any()
    assert engine.ranks("a").tolist() == [4] * 3
    resumed = AllocatorEngine(config)
    resumed.load_state_dict(engine.state_dict())
    for each in (engine, resumed):
        each.observe("a", routing=[0.5, 0.3, 0.2], importance=np.ones((3, 4)))
        each.step()
        assert each.ranks("a").sum() == 6
