"""States that an engine refuses: a clear error, and an engine exactly as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from drlora_core import LayoutError
from tests.core.comparison import assert_same_state, build
from tests.core.test_engine import FIRST, LAYERS, OPTIONS, PRUNE, running


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
