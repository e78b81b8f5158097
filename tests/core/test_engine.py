"""Misuse of the engine: a clear error, and an engine exactly as it was."""

from __future__ import annotations

import copy
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


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of a state: ``path`` is dotted below ``layers[FIRST]`` if it begins with a dot."""

    def edit(state: dict[str, Any]) -> None:
        place = state["layers"][FIRST] if path.startswith(".") else state
        keys = path.strip(".").split("/")
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value(place[keys[-1]]) if callable(value) else value

    return edit


def removed(*path: str) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return edit


def renamed(state: dict[str, Any]) -> None:
    state["layers"] = {name.replace("mlp", "moe"): v for name, v in state["layers"].items()}


def reordered(state: dict[str, Any]) -> None:
    state["layers"] = dict(reversed(state["layers"].items()))


def resized(state: dict[str, Any]) -> None:
    layer = state["layers"][FIRST]
    for key in ("ranks", "routing", "importance", "importance_count"):
        layer[key] = layer[key][:2]


DAMAGE: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    (
        "foreign",
        dict.clear,
        "has version None; this drlora reads version 1",
    ),
    ("version", changed("version", 2), "has version 2; this drlora reads version 1"),
    ("no carry", removed("carry"), "not an engine state: carry: Field required"),
    ("config", changed("config/gamma", 2.0), r"another configuration: gamma 2.0 \(here 1.0\)"),
    ("config field", removed("config", "r_target"), r"r_target 16 \(here 2\)"),
    ("config type", changed("config", 3), "config: Input should be a valid dictionary, got 3"),
    ("layers type", changed("layers", [1]), "layers: Input should be a valid dictionary"),
    ("renamed", renamed, "has a layer 'layers.0.moe'; did you mean 'layers.0.mlp'"),
    ("reordered", reordered, "another order"),
    ("resized", resized, "has 3 experts, the state has 2"),
    ("step", changed("step", -1), "step: .* greater than or equal to 0, got -1"),
    ("huge step", changed("step", 10**400), "step: must be at most 1,000,000,000,000"),
    ("huge carry", changed("carry", [0, 10**400]), "carry.1: Input should be less than or equal"),
    ("huge f", changed(".routing", lambda a: a + 1e300), r"1e\+300; accepted: at most 1e\+100"),
    ("huge g", changed(".importance", lambda a: a + 1e300), r"accepted: at most 1e\+100"),
    ("huge n", changed(".importance_count", lambda a: a + 2**60), "accepted: at most 9"),
    ("step type", changed("step", 1.0), "step: must be a whole number, got 1.0"),
    ("carry", changed("carry", [0]), "carries 1 quotas for 2 pools"),
    ("carry type", changed("carry", 0), "carry: Input should be a valid tuple, got 0"),
    ("carry value", changed("carry", [0, -1]), "carry.1: .* greater than or equal to 0, got -1"),
    (
        "field missing",
        removed("layers", FIRST, "routing"),
        "layers.0.mlp.routing: Field required",
    ),
    ("field extra", changed(".extra", 0), "layers.0.mlp.extra: Extra inputs"),
    (
        "layer type",
        changed(f"layers/{FIRST}", 3),
        "layers.0.mlp: Input should be a valid dictionary",
    ),
    (
        "dtype",
        changed(".ranks", lambda a: a.astype(float)),
        r"ranks: is float64\[3\]; accepted: int64",
    ),
    ("shape", changed(".routing", lambda a: a[:2]), r"routing has shape \(2,\), not \(3,\)"),
    ("rank 2-d", changed(".ranks", lambda a: a[None]), r"ranks have shape \(1, 3\)"),
    ("ragged", changed(".ranks", [[1], [1, 2]]), "ranks: .*inhomogeneous shape"),
    ("ragged g", changed(".importance", [[1], [1, 2]]), "importance: .*inhomogeneous shape"),
    ("nan", changed(".routing", lambda a: a * np.nan), "routing: holds a negative or non-finite"),
    ("count", changed(".importance_count", lambda a: a - 9), "importance_count: holds a negative"),
    (
        "count type",
        changed(".routing_count", True),
        "routing_count: must be a whole number, got True",
    ),
    ("huge count", changed(".routing_count", 2**63), "routing_count: Input should be less than"),
    ("observed", changed(".observed", "no"), "observed: Input should be a valid boolean, got 'no'"),
    ("rank low", changed(".ranks", lambda a: a * 0), r"ranks lie in 0\.\.0, not 1\.\.4"),
    ("rank high", changed(".ranks", lambda a: a * 0 + 5), r"ranks lie in 5\.\.5"),
    (
        "over budget",
        changed(".ranks", lambda a: a * 0 + 3),
        "ranks of layer 'layers.0.mlp' sum to 9, above the budget of 6",
    ),
]


@pytest.mark.parametrize(
    ("damage", "message"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE]
)
def test_a_damaged_or_foreign_state_is_refused(
    damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    engine = running()
    before = engine.state_dict()
    state = copy.deepcopy(before)
    damage(state)
    with pytest.raises(LayoutError, match=message):
        engine.load_state_dict(state)
    assert_same_state(engine.state_dict(), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("routing", 1e100),
        ("importance", 1e100),
        ("importance_count", 2**53),
        ("routing_count", 2**53),
    ],
)
def test_the_largest_values_of_a_state_are_accepted(field: str, value: float) -> None:
    engine = running()
    state = engine.state_dict()
    changed(f".{field}", value if field == "routing_count" else lambda a: a * 0 + value)(state)
    engine.load_state_dict(state)
    assert_same_state(engine.state_dict(), state)


@pytest.mark.parametrize("state", [None, [], "state", 3])
def test_what_is_no_dict_is_no_state(state: Any) -> None:
    with pytest.raises(LayoutError, match="an engine state is a dict, got"):
        running().load_state_dict(state)


def test_a_layer_missing_from_a_state_is_named() -> None:
    small = build(OPTIONS, {FIRST: 3})
    with pytest.raises(LayoutError, match=r"the state lacks layer 'layers\.1\.mlp'"):
        build(OPTIONS, LAYERS).load_state_dict(small.state_dict())


def test_a_pruned_state_must_have_the_total_of_its_step() -> None:
    engine = running(PRUNE)
    before = engine.state_dict()
    for expert in range(3):
        state = copy.deepcopy(before)
        ranks = state["layers"][FIRST]["ranks"]
        ranks[expert] += 1 if ranks[expert] == 1 else -1
        with pytest.raises(LayoutError, match=r"ranks of .* sum to \d, but pruning leaves \d"):
            engine.load_state_dict(state)
    state = copy.deepcopy(before)
    state["layers"][FIRST]["dimensions"] = None
    with pytest.raises(LayoutError, match=r"dimensions has shape None, not \(3, 4\)"):
        engine.load_state_dict(state)
    assert_same_state(engine.state_dict(), before)


def test_a_global_state_above_a_layer_ceiling_is_refused() -> None:
    options = OPTIONS | {"scope": "global", "layer_ceiling": 2}
    engine = build(options, {"a": 1, "b": 4})
    state = engine.state_dict()
    state["layers"]["a"]["ranks"][:] = 4
    with pytest.raises(LayoutError, match="'a': ranks sum to 4, above its ceiling of 2"):
        engine.load_state_dict(state)


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
