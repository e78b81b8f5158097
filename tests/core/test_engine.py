"""Misuse of the engine: a clear error, and an engine exactly as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from drlora_core import (
    AllocatorConfig,
    AllocatorEngine,
    LayoutError,
    PolicyError,
    StatisticError,
    StepOrderError,
    UnknownLayerError,
)
from tests.core.comparison import assert_same_state, build, feed
from tests.strategies import make_samples

OPTIONS: dict[str, Any] = {
    **{"r_init": 1, "r_target": 2, "r_max": 4},
    **{"warmup_steps": 1, "growth_interval": 2, "growth_end": 5, "policy": "greedy"},
}
PRUNE = OPTIONS | {"policy": "prune", "r_init": 4}
LAYERS = {"layers.0.mlp": 3, "layers.1.mlp": 2}
FIRST = "layers.0.mlp"


def running(options: dict[str, Any] = OPTIONS, steps: int = 3, **engine: Any) -> AllocatorEngine:
    """An engine some steps into a run, with the first layer of the next step observed."""
    made = build(options, LAYERS, **engine)
    feed(made, make_samples(options, LAYERS, 0, "generic", steps))
    made.observe(FIRST, routing=np.ones(3), importance=np.ones((3, 4)))
    return made


Action = Callable[[AllocatorEngine], Any]


def sample(routing: Any, importance: Any) -> Action:
    return lambda engine: engine.observe("layers.1.mlp", routing=routing, importance=importance)


ok = [0.5, 0.5]
MISUSE: list[tuple[str, Action, type[Exception], str]] = [
    (
        "unknown layer",
        lambda e: e.observe("layers.0.mpl", routing=ok, importance=ok),
        UnknownLayerError,
        "no layer 'layers.0.mpl'; did you mean 'layers.0.mlp'",
    ),
    ("far name", lambda e: e.ranks("x"), UnknownLayerError, "known: 'layers.0.mlp', 'layers.1.mlp"),
    ("no name", lambda e: e.saliency(cast(Any, ["x"])), UnknownLayerError, "no layer"),
    ("skip unknown", lambda e: e.skip("layers.2"), UnknownLayerError, "no layer 'layers.2'"),
    ("short", sample([0.5], ok), StatisticError, r"routing has shape \(1,\); accepted: \(2,\)"),
    ("long", sample(ok, [1.0] * 3), StatisticError, r"accepted: \(2,\) or \(2, 4\)"),
    ("2-d routing", sample([ok, ok], ok), StatisticError, r"routing has shape \(2, 2\)"),
    ("narrow", sample(ok, np.ones((2, 3))), StatisticError, r"shape \(2, 3\)"),
    ("scalar", sample(0.5, ok), StatisticError, r"routing has shape \(\)"),
    (
        "negative",
        sample([0.5, -0.1], ok),
        StatisticError,
        r"routing\[1\] is -0.1; accepted: finite",
    ),
    ("zero is none", sample(ok, [0.0, -1.0]), StatisticError, r"importance\[1\] is -1"),
    ("nor is the largest", sample(ok, [1e100, -1.0]), StatisticError, r"importance\[1\] is -1"),
    ("nan", sample([float("nan"), 0.5], ok), StatisticError, r"routing\[0\] is nan"),
    ("inf", sample(ok, [1.0, float("inf")]), StatisticError, r"importance\[1\] is inf"),
    ("nan dimension", sample(ok, np.full((2, 4), np.nan)), StatisticError, r"importance\[0, 0\]"),
    (
        "huge",
        sample(ok, np.full((2, 4), 1e101)),
        StatisticError,
        r"importance\[0, 0\] is 1e\+101; accepted: finite numbers >= 0, at most 1e\+100",
    ),
    ("ragged", sample([[1.0], [1.0, 2.0]], ok), StatisticError, "routing is not an array"),
    ("ragged 2", sample(ok, [[1.0], [1.0, 2.0]]), StatisticError, "4: importance is not an array"),
    ("text", sample(["1", "2"], ok), StatisticError, "routing is not an array of numbers"),
    ("complex", sample([1j, 1j], ok), StatisticError, "routing is not an array of numbers"),
    ("objects", sample([object(), object()], ok), StatisticError, "not an array of numbers"),
    ("no routing", sample(None, ok), StatisticError, "only with use_routing=False"),
    ("no importance", sample(ok, None), StatisticError, "only with use_importance=False"),
    (
        "twice",
        lambda e: e.observe(FIRST, routing=np.ones(3), importance=np.ones(3)),
        StepOrderError,
        "'layers.0.mlp' was already observed in step 4; average the micro-batches",
    ),
    ("skip late", lambda e: e.skip(FIRST), StepOrderError, "already observed in step 4"),
    (
        "unobserved",
        lambda e: e.step(),
        StepOrderError,
        r"step 4 has no sample of 1 of 2 layers, first 'layers.1.mlp'; .*engine.skip\(name\)",
    ),
    ("late layer", lambda e: e.add_layer("new", 2), LayoutError, "'new' comes too late"),
    ("layer again", lambda e: e.add_layer(FIRST, 2), LayoutError, "already added"),
    ("unnamed layer", lambda e: e.add_layer(cast(Any, 3), 2), LayoutError, "must be a str, got 3"),
    ("no experts", lambda e: e.add_layer("new", 0), LayoutError, "whole number above 0, got 0"),
    (
        "half expert",
        lambda e: e.add_layer("new", cast(Any, 1.5)),
        LayoutError,
        "whole number above 0, got 1.5",
    ),
    (
        "true experts",
        lambda e: e.add_layer("new", True),
        LayoutError,
        "whole number above 0, got True",
    ),
]


@pytest.mark.parametrize(
    ("action", "error", "message"), [row[1:] for row in MISUSE], ids=[row[0] for row in MISUSE]
)
def test_misuse_is_refused_and_changes_nothing(
    action: Action, error: type[Exception], message: str
) -> None:
    engine = running()
    before = engine.state_dict()
    with pytest.raises(error, match=f"(?s){message}"):
        action(engine)
    assert_same_state(engine.state_dict(), before)


def test_step_without_layers_is_refused() -> None:
    engine = AllocatorEngine(AllocatorConfig())
    with pytest.raises(StepOrderError, match=r"no layers; call engine.add_layer"):
        engine.step()
    assert engine.step_count == 0


def test_prune_wants_the_importance_of_every_dimension() -> None:
    engine = build(PRUNE, LAYERS)
    before = engine.state_dict()
    with pytest.raises(StatisticError, match=r"needs that of every rank dimension.*\(3, 4\)"):
        engine.observe(FIRST, routing=np.ones(3), importance=np.ones(3))
    with pytest.raises(StatisticError, match="importance is missing"):
        engine.observe(FIRST, routing=np.ones(3), importance=None)
    assert_same_state(engine.state_dict(), before)


def test_prune_takes_no_callable() -> None:
    with pytest.raises(LayoutError, match="'prune' cuts rank and cannot be combined"):
        AllocatorEngine(AllocatorConfig(**PRUNE), policy=lambda request: request.limits)


BAD_POLICIES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("raises", lambda request: request.no_such_field, "failed: AttributeError"),
    ("float", lambda request: request.saliency, "returned float64; return an integer array"),
    ("list", lambda request: [0, 0, 0], "returned list; return an integer array"),
    ("bool", lambda request: request.limits > 0, "returned bool"),
    ("short", lambda request: request.limits[:-1], "returned shape"),
    ("negative", lambda request: -request.limits, r"growth -\d, below 0 \(accepted: 0 to"),
    ("limit", lambda request: request.limits + 1, r"growth \d, above its limit"),
    ("quota", lambda request: request.limits, r"spent \d units of a quota of \d"),
    ("writes", lambda request: request.limits.sort(), "read-only"),
]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("policy", "message"), [row[1:] for row in BAD_POLICIES], ids=[row[0] for row in BAD_POLICIES]
)
def test_a_policy_that_breaks_its_contract_changes_nothing(
    policy: Callable[[Any], Any], message: str, scope: str
) -> None:
    engine = build(OPTIONS | {"scope": scope}, LAYERS, policy=policy)
    engine_samples = make_samples(OPTIONS, LAYERS, 1, "generic", 3)
    feed(engine, engine_samples[:2])
    for name, size in LAYERS.items():
        engine.observe(name, routing=np.ones(size), importance=np.ones(size))
    before = engine.state_dict()
    with pytest.raises(PolicyError, match=f"at step 3, .*{message}"):
        engine.step()
    assert_same_state(engine.state_dict(), before)


def test_answers_are_copies() -> None:
    engine = running()
    before = engine.state_dict()
    for array in (engine.ranks(FIRST), engine.saliency(FIRST), engine.rank_importance(FIRST)):
        array[:] = 99
    state = engine.state_dict()
    state["layers"][FIRST]["ranks"][:] = 99
    assert_same_state(engine.state_dict(), before)


def test_event_arrays_are_not_the_engines_own() -> None:
    engine = build(OPTIONS, LAYERS)
    event = feed(engine, make_samples(OPTIONS, LAYERS, 0, "generic", 3))[-1]
    assert event is not None
    before = engine.state_dict()
    for name in LAYERS:
        event.ranks[name][:] = 99
        event.deltas[name][:] = 99
    assert_same_state(engine.state_dict(), before)


def test_inactive_columns_of_importance_do_not_count() -> None:
    """Columns beyond r_i may hold anything, even NaN."""
    importance = np.full((3, 4), np.nan)
    importance[:, 0] = [1.0, 2.0, 3.0]
    engine = build(OPTIONS, {FIRST: 3})
    engine.observe(FIRST, routing=np.ones(3), importance=importance)
    assert engine.rank_importance(FIRST) == pytest.approx([1.0, 2.0, 3.0], rel=1e-12)


def test_float32_samples_are_averaged_in_float64() -> None:
    engine = build(OPTIONS, {FIRST: 3})
    phi = np.array([0.1, 0.2, 0.3], dtype=np.float32)
    engine.observe(FIRST, routing=phi, importance=phi)
    assert engine.routing_frequency(FIRST).dtype == np.float64
    assert engine.routing_frequency(FIRST) == pytest.approx(phi.astype(np.float64), rel=1e-12)


def test_a_fixed_quota_that_falls_short_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(OPTIONS | {"quota": 1}, {FIRST: 3})
    assert "quota 1 x 2 events = 2 < 3 needed; total rank will end at 5 of 6" in caplog.text


def test_a_shortfall_by_max_growth_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    options = OPTIONS | {"quota": 9, "max_growth": 1, "r_target": 4}
    with caplog.at_level(logging.WARNING):
        engine = build(options, {FIRST: 3})
    assert "total rank will end at 9 of 12" in caplog.text
    feed(engine, make_samples(options, {FIRST: 3}, 0, "generic", 6))
    assert engine.ranks(FIRST).sum() == 9


@pytest.mark.parametrize("quota", [None, 2, 9])
def test_nothing_is_reported_where_the_budget_is_met(
    caplog: pytest.LogCaptureFixture, quota: int | None
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = build(OPTIONS | {"quota": quota}, {FIRST: 3})
    assert caplog.text == ""
    feed(engine, make_samples(OPTIONS, {FIRST: 3}, 0, "generic", 6))
    assert engine.ranks(FIRST).sum() == 6
