"""The checks can fail: engines and policies with a seeded bug, each of which must be rejected.

A bug is put into drlora_core by monkeypatch; the same runs that the real engine passes in
test_against_reference must then hold one on which it decides otherwise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from drlora_core import ema, events, moving, policies, pools, pruning, timetable
from drlora_core import saliency as equations
from drlora_core import state as states
from drlora_core.policies import AllocationRequest
from drlora_core.state import State
from drlora_core.testing import check_policy, make_request
from tests.core.comparison import assert_same_decisions, build
from tests.core.test_against_reference import random_run
from tests.marks import one_in
from tests.strategies import STYLES


def find_a_difference(policy: str) -> None:
    """Raise AssertionError on the first of 120 runs that differs (a part of the runs there)."""
    for seed, style in itertools.product(range(30), STYLES):
        assert_same_decisions(*random_run(seed, policy, style))


def no_bias_correction(average: Any, count: Any, decay: float) -> Any:
    return average


def swapped_decay(average: Any, sample: Any, decay: float) -> Any:
    average[:] = (1 - decay) * average + decay * sample


def no_reset(state: State, growth: Any) -> State:
    return dataclasses.replace(state, ranks=state.ranks + growth)


def count_not_reset(state: State, growth: Any) -> State:
    unchanged = growth == 0
    importance = np.where(unchanged, state.importance, 0.0)
    return dataclasses.replace(state, ranks=state.ranks + growth, importance=importance)


def resets_routing_too(state: State, growth: Any) -> State:
    unchanged = growth == 0
    return dataclasses.replace(
        state,
        ranks=state.ranks + growth,
        routing=np.where(unchanged, state.routing, 0.0),
        importance=np.where(unchanged, state.importance, 0.0),
        importance_count=np.where(unchanged, state.importance_count, 0),
    )


def resets_everybody(state: State, growth: Any) -> State:
    return dataclasses.replace(
        state,
        ranks=state.ranks + growth,
        importance=np.zeros_like(state.importance),
        importance_count=np.zeros_like(state.importance_count),
    )


def penalty_without_one(routing: Any, importance: Any, ranks: Any, gamma: float) -> Any:
    return routing * importance / ranks**gamma


def importance_of_zero_is_zero(routing: Any, importance: Any, known: Any, sizes: Any) -> Any:
    return np.zeros_like(routing)


def mean_over_all_layers(routing: Any, importance: Any, known: Any, sizes: Any) -> Any:
    return importance_at_zero(routing, importance, known, [sum(sizes)])


def mean_over_all_experts(routing: Any, importance: Any, known: Any, sizes: Any) -> Any:
    return importance_at_zero(routing, importance, np.ones_like(known), sizes)


def mean_over_r_max(sample: Any, ranks: Any) -> Any:
    return sample.mean(axis=1)


def event_one_step_late(step: int, warmup: int, interval: int, end: int) -> int | None:
    return timetable_event_index(step - 1, warmup, interval, end)


def event_at_the_end_of_warmup(step: int, warmup: int, interval: int, end: int) -> int | None:
    if not warmup <= step <= end:
        return None
    index, remainder = divmod(step - warmup, interval)
    return None if remainder else index + 1


def event_not_at_growth_end(step: int, warmup: int, interval: int, end: int) -> int | None:
    return timetable_event_index(step, warmup, interval, end - 1)


def rounded_quota(event: int, num_events: int, budget: int) -> int:
    return -(-budget // num_events)


def no_carry(*arguments: Any) -> Any:
    event, state, carry = events_decide(*arguments)
    return event, state, (0,) * len(carry)


def ties_by_index_only(scores: Any, request: AllocationRequest) -> Any:
    flat = dataclasses.replace(request, ranks=np.zeros_like(request.ranks))
    return policies_walk(scores, flat)


def ties_to_the_later_expert(scores: Any, request: AllocationRequest) -> Any:
    backwards = dataclasses.replace(
        request, ranks=request.ranks[..., ::-1].copy(), limits=request.limits[..., ::-1].copy()
    )
    return policies_walk(scores[..., ::-1], backwards)[..., ::-1].copy()


def cut_by_threshold(scores: Any, ranks: Any, count: int, keep: int) -> Any:
    """AdaLoRA's way: everything up to the count-th smallest score goes, ties and all."""
    active = equations.active_dimensions(ranks, scores.shape[1])
    if count == 0:
        return np.zeros_like(active)
    threshold = np.sort(scores[active])[count - 1]
    cut = active & (scores <= threshold)
    cut[:, 0] = False  # at least every expert keeps one
    return cut


def cut_without_compaction(values: Any, cut: Any) -> Any:
    return np.where(cut, 0.0, values)


def rescored_in_one_walk(request: AllocationRequest) -> Any:
    return policies_walk(request.saliency, request)


def keeps_the_averages_of_dimensions(state: State, growth: Any) -> State:
    return dataclasses.replace(states_grow(state, growth), dimensions=state.dimensions)


def gives_whatever_it_is_worth(request: Any, growth: Any, may_give: Any, r_min: int) -> Any:
    return np.where(may_give & (growth == 0), np.maximum(request.ranks - r_min, 0), 0)


def gives_right_after_growth(request: Any, growth: Any, may_give: Any, r_min: int) -> Any:
    return moving_spare_units(request, growth, np.ones_like(may_give), r_min)


def gives_all(request: Any, growth: Any, may_give: Any, r_min: int) -> Any:
    return moving_spare_units(request, growth, may_give, 0)


def gives_and_receives(request: Any, growth: Any, may_give: Any, r_min: int) -> Any:
    one = np.where(growth == growth.max(), growth, 0)
    return moving_spare_units(request, one, may_give, r_min)


def moves_one_less(*arguments: Any) -> int:
    return max(timetable_moved_units(*arguments) - 1, 0)


def moves_as_much_at_every_event(event: int, *arguments: Any) -> int:
    return timetable_moved_units(1, *arguments)


importance_at_zero = equations.importance_at_zero
timetable_event_index = timetable.event_index
timetable_moved_units = timetable.moved_units
moving_spare_units = moving.spare_units
states_grow = states.grow
events_decide = events.decide
policies_walk = policies.walk

BUGS: list[tuple[str, Any, str, Any]] = [
    ("greedy", ema, "correct_bias", no_bias_correction),
    ("greedy", ema, "update", swapped_decay),
    ("greedy", states, "grow", no_reset),
    ("greedy", states, "grow", count_not_reset),
    ("greedy", states, "grow", resets_routing_too),
    ("greedy", states, "grow", resets_everybody),
    ("greedy", states, "saliency", penalty_without_one),
    ("greedy", states, "mean_over_active", mean_over_r_max),
    ("greedy", states, "importance_at_zero", importance_of_zero_is_zero),
    ("proportional", states, "importance_at_zero", mean_over_all_layers),
    ("greedy", states, "importance_at_zero", mean_over_all_experts),
    ("greedy", timetable, "event_index", event_one_step_late),
    ("greedy", timetable, "event_index", event_at_the_end_of_warmup),
    ("greedy", timetable, "event_index", event_not_at_growth_end),
    ("greedy", timetable, "even_quota", rounded_quota),
    ("greedy", events, "decide", no_carry),
    ("greedy", policies, "walk", ties_by_index_only),
    ("greedy", policies, "walk", ties_to_the_later_expert),
    ("proportional", policies, "walk", ties_to_the_later_expert),
    ("prune", pruning, "least_important", cut_by_threshold),
    ("prune", pruning, "compact", cut_without_compaction),
    ("prune", ema, "correct_bias", no_bias_correction),
    ("move", pruning, "compact", cut_without_compaction),
    ("move", states, "grow", keeps_the_averages_of_dimensions),
    ("move", moving, "GAIN", 1.0),
    ("move", moving, "spare_units", gives_whatever_it_is_worth),
    ("move", moving, "spare_units", gives_right_after_growth),
    ("move", moving, "spare_units", gives_all),
    ("move", moving, "spare_units", gives_and_receives),
    ("move", timetable, "moved_units", moves_one_less),
    ("move", timetable, "moved_units", moves_as_much_at_every_event),
]


@pytest.mark.parametrize(
    ("policy", "module", "name", "bug"),
    one_in(2, BUGS),
    ids=[f"{row[0]}-{getattr(row[3], '__name__', row[2])}" for row in BUGS],
)
def test_an_engine_with_a_bug_is_rejected(
    policy: str, module: Any, name: str, bug: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, bug)
    with pytest.raises(AssertionError):
        find_a_difference(policy)


def overspends(request: AllocationRequest) -> Any:
    """Spends one unit more than the quota where the limits let it."""
    return policies_walk(request.saliency, dataclasses.replace(request, quota=request.quota + 1))


@pytest.mark.parametrize("bug", [overspends, rescored_in_one_walk])
def test_a_wrong_policy_is_rejected(
    bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if nobody checked what a policy returns, the comparison would tell."""
    name = "greedy" if bug is overspends else "rescored"
    growing = dict(policies.GROWTH_POLICIES) | {name: bug}
    monkeypatch.setattr("drlora_core.engine.GROWTH_POLICIES", growing)
    monkeypatch.setattr(pools, "run_policy", lambda policy, request, experts: policy(request))
    with pytest.raises(AssertionError):
        find_a_difference(name)


def test_threshold_pruning_loses_the_budget_when_all_scores_tie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pruning, "least_important", cut_by_threshold)
    options: dict[str, Any] = {
        "r_init": 4,
        "r_target": 2,
        "r_max": 4,
        "warmup_steps": 0,
        "growth_interval": 1,
    }
    options |= {"growth_end": 1, "policy": "prune"}
    engine = build(options, {"a": 3})
    engine.observe("a", routing=[1.0] * 3, importance=np.ones((3, 4)))
    engine.step()
    assert engine.ranks("a").sum() == 3  # of a budget of 6


def test_global_scope_without_capacities_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def unbounded(policy: Any, request: Any, pool: Any, floors: Any, capacities: Any) -> Any:
        return policy(request)

    options: dict[str, Any] = {
        "r_init": 1,
        "r_target": 3,
        "r_max": 9,
        "warmup_steps": 0,
        "growth_interval": 1,
    }
    options |= {"growth_end": 2, "scope": "global", "layer_ceiling": 3, "gamma": 0.0}
    sizes = {"a": 2, "b": 4}
    totals = []
    for allocate in (pools.allocate, unbounded):
        monkeypatch.setattr(events, "allocate", allocate)
        engine = build(options, sizes)
        for _ in range(2):
            engine.observe("a", routing=[9, 0], importance=[1, 1])
            engine.observe("b", routing=[1, 1, 1, 1], importance=[1, 1, 1, 1])
            engine.step()
        totals.append(engine.ranks("a").sum())
    assert totals[0] <= 2 * 3 < totals[1]


calls = itertools.count()


def moody(request: AllocationRequest) -> Any:
    growth = np.zeros_like(request.ranks)
    growth[0] = min(request.quota, request.limits[0], next(calls) % 2)
    return growth


def scribbles(request: AllocationRequest) -> Any:
    request.limits[:] = 0
    return request.limits.copy()


def scribbles_by_force(request: AllocationRequest) -> Any:
    request.routing.setflags(write=True)
    request.routing[:] = 0.0
    return np.zeros_like(request.ranks)


def first_come(request: AllocationRequest) -> Any:
    return policies_walk(-np.arange(request.ranks.size, dtype=float), request)


def crashes_without_room(request: AllocationRequest) -> Any:
    return request.limits * 0 + 0 // int(request.limits.sum())


LATE = (first_come, policies.random, moody)
"""Rejected after many examples."""
LEFT_OUT = [pytest.mark.slow, pytest.mark.exhaustive]
REJECTED: list[tuple[Callable[..., Any], str]] = [
    (overspends, r"'overspends' .* spent \d+ units of a quota of \d+"),
    (lambda request: request.limits + 1, "above its limit"),
    (lambda request: -np.ones_like(request.ranks), r"growth -1, below 0"),
    (lambda request: np.zeros(request.ranks.size), "returned float64; return an integer array"),
    (lambda request: request.limits[:0], "returned shape"),
    (lambda request: None, "returned NoneType"),
    (moody, "'moody' is not deterministic"),
    (scribbles, "'scribbles' writes to its input"),
    (scribbles_by_force, "'scribbles_by_force' writes to its input 'routing'"),
    (first_come, "'first_come' depends on the numbering of the experts"),
    (policies.random, "'random' depends on the numbering of the experts"),
    (crashes_without_room, "'crashes_without_room' .* failed: ZeroDivisionError"),
]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        pytest.param(*row, marks=LEFT_OUT if row[0] in LATE or i % 2 else [], id=row[1][:40])
        for i, row in enumerate(REJECTED)
    ],
)
def test_check_policy_rejects(policy: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(policy)


def test_check_policy_accepts_index_order_on_request() -> None:
    check_policy(first_come, equivariant=False)


def test_check_policy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hypothesis", None)
    with pytest.raises(ImportError, match="check_policy needs hypothesis; pip install hypothesis"):
        check_policy(policies.greedy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quota": -1}, "quota must be >= 0, got -1"),
        ({"ranks": [-1, 1]}, "ranks must be a list of whole numbers >= 0"),
        ({"ranks": [1.0, 1.0]}, "ranks must be a list of whole numbers"),
        ({"limits": [-1, 1]}, "limits must be a list of whole numbers >= 0"),
        ({"limits": [1]}, r"limits has shape \(1,\); ranks have \(2,\)"),
        ({"routing": [1.0]}, r"routing has shape \(1,\)"),
        ({"importance": [1.0, float("nan")]}, "importance must be a list of finite numbers >= 0"),
        ({"saliency": [1.0, 1.0], "gamma": 1.0}, "not both"),
    ],
)
def test_make_request_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_request(**{"quota": 1, "ranks": [1, 1], "limits": [1, 1], **arguments})
