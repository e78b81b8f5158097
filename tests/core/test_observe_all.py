"""One call for all layers gives what ``observe`` and ``skip`` give layer by layer, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import (
    AllocatorEngine,
    LayoutError,
    StatisticError,
    StepOrderError,
    UnknownLayerError,
)
from tests.core.comparison import assert_same_events, assert_same_state, build, feed
from tests.strategies import Samples, layers, make_samples, options, seeds, styles

OPTIONS: dict[str, Any] = {
    **{"r_init": 1, "r_target": 2, "r_max": 4, "policy": "greedy"},
    **{"warmup_steps": 1, "growth_interval": 2, "growth_end": 5},
}
FREE = OPTIONS | {"use_routing": False, "use_importance": False}
ALIKE = {"layers.0.mlp": 2, "layers.1.mlp": 2}
FIRST, SECOND = ALIKE


def feed_together(engine: AllocatorEngine, samples: Samples, arrays: bool) -> list[Any]:
    """Like ``feed``, with one call per step; ``arrays``: [L, N] where that is possible."""
    events = []
    for step in samples:
        taken = {name: sample for name, sample in step.items() if sample != (None, None)}
        routing, importance = ({n: pair[i] for n, pair in taken.items()} for i in (0, 1))
        shapes = {np.shape(value) for value in importance.values()}
        given: tuple[Any, Any] = (routing, importance)
        if arrays and len(shapes) == 1 and len(taken) == len(step):
            given = (np.array([*routing.values()]), np.array([*importance.values()]))
        engine.observe_all(routing=given[0], importance=given[1])
        events.append(engine.step())
    return events


@given(
    options(scopes=("layer", "global")),
    layers() | st.integers(1, 6).map(lambda size: {"a": size, "b": size, "c": size}),
    seeds,
    styles,
    st.booleans(),
)
def test_one_call_equals_many(
    options: dict[str, Any], layers: dict[str, int], seed: int, style: str, arrays: bool
) -> None:
    samples = make_samples(options, layers, seed, style, options["growth_end"] + 1)
    many, one = build(options, layers), build(options, layers)
    assert_same_events(feed_together(one, samples, arrays), feed(many, samples))
    assert_same_state(one.state_dict(), many.state_dict())


@pytest.mark.parametrize("policy", ["greedy", "prune"])
def test_recordings_are_the_same_byte_for_byte(tmp_path: Path, policy: str) -> None:
    options = OPTIONS | {"policy": policy, "r_init": 4 if policy == "prune" else 1}
    samples = make_samples(options, ALIKE, 0, "generic", 6)
    for how in ("many", "one"):
        engine = build(options, ALIKE)
        engine.record_to(tmp_path / how)
        feed(engine, samples) if how == "many" else feed_together(engine, samples, arrays=True)
        engine.record_to(None)
    files = {how: sorted((tmp_path / how).iterdir()) for how in ("many", "one")}
    assert [path.name for path in files["many"]] == [path.name for path in files["one"]]
    for many, one in zip(files["many"], files["one"], strict=True):
        assert many.read_bytes() == one.read_bytes()


class Told:
    """A recorder that remembers the tokens."""

    def __init__(self) -> None:
        self.tokens: dict[str, int | None] = {}

    def sample(self, name: str, routing: Any, importance: Any, tokens: int | None) -> None:
        self.tokens[name] = tokens

    def step(self, step: int, ranks: Any, event: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (None, [None, None]),
        (7, [7, 7]),
        ([7, 8], [7, 8]),
        (np.array([7, 8]), [7, 8]),
        ({FIRST: 7, SECOND: 8}, [7, 8]),
        ({SECOND: 8}, [None, 8]),
    ],
)
def test_tokens_reach_the_recorder(tokens: Any, told: list[int | None]) -> None:
    engine, recorder = build(OPTIONS, ALIKE), Told()
    engine.record_to(recorder)
    engine.observe_all(routing=np.ones((2, 2)), importance=np.ones((2, 2)), tokens=tokens)
    assert [recorder.tokens[name] for name in ALIKE] == told


def test_a_layer_that_is_left_out_is_skipped() -> None:
    engine = build(OPTIONS, ALIKE)
    engine.observe_all(routing={SECOND: [0.5, 0.5]}, importance={SECOND: [1.0, 1.0]})
    assert engine.routing_frequency(FIRST).tolist() == [0.0, 0.0]
    assert engine.routing_frequency(SECOND) == pytest.approx([0.5, 0.5])
    assert engine.is_observed(FIRST)
    engine.step()
    engine.observe_all(routing={}, importance={})  # nothing was sampled
    engine.step()
    assert engine.step_count == 2


def test_both_statistics_may_be_switched_off() -> None:
    engine = build(FREE, ALIKE)
    engine.observe_all(routing=None, importance=None)
    engine.step()
    assert engine.step_count == 1


def test_layers_may_differ_in_whether_importance_has_dimensions() -> None:
    one, many = build(OPTIONS, ALIKE), build(OPTIONS, ALIKE)
    routing = {name: [0.5, 0.5] for name in ALIKE}
    importance = {FIRST: [1.0, 2.0], SECOND: np.full((2, 4), 3.0)}
    one.observe_all(routing=routing, importance=importance)
    for name in ALIKE:
        many.observe(name, routing=routing[name], importance=importance[name])
    assert_same_state(one.state_dict(), many.state_dict())


ok = np.full((2, 2), 0.5)
bad = np.array([[0.5, 0.5], [0.5, np.nan]])
MISUSE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("nan", {"routing": bad}, StatisticError, rf"'{SECOND}', step 1: routing\[1\] is nan"),
    ("inf", {"importance": bad * np.inf}, StatisticError, rf"'{FIRST}', step 1: importance\[0\]"),
    ("narrow", {"routing": ok[:, :1]}, StatisticError, rf"'{FIRST}', step 1: routing has shape"),
    ("layers", {"routing": ok[:1]}, StatisticError, r"routing has shape \(1, 2\); .* 2 layers"),
    ("flat", {"importance": ok[0]}, StatisticError, r"importance has shape \(2,\); accepted"),
    ("ragged", {"routing": [[1.0], [1.0, 2.0]]}, StatisticError, "routing is not an array"),
    ("text", {"routing": [["a", "b"]] * 2}, StatisticError, "routing is not an array of numbers"),
    ("no routing", {"routing": None}, StatisticError, rf"'{FIRST}'.*only with use_routing=False"),
    ("no importance", {"importance": None}, StatisticError, "only with use_importance=False"),
    (
        "one layer long, one short",
        {"routing": {FIRST: [0.5], SECOND: [0.5] * 3}},
        StatisticError,
        rf"'{FIRST}', step 1: routing has shape \(1,\)",
    ),
    (
        "unpaired",
        {"routing": {FIRST: ok[0]}, "importance": {SECOND: ok[0]}},
        StatisticError,
        f"'{FIRST}' has routing but no importance",
    ),
    (
        "unpaired the other way",
        {"routing": {SECOND: ok[0]}, "importance": {FIRST: ok[0], SECOND: ok[0]}},
        StatisticError,
        f"'{FIRST}' has importance but no routing",
    ),
    (
        "both long and short",
        {key: {FIRST: [0.5], SECOND: [0.5] * 3} for key in ("routing", "importance")},
        StatisticError,
        rf"'{FIRST}', step 1: routing has shape \(1,\)",
    ),
    (
        "half an array",
        {"importance": {FIRST: ok[0]}},
        StatisticError,
        f"'{SECOND}' has routing but no importance",
    ),
    (
        "unknown",
        {"routing": {"layers.0.mpl": ok[0]}},
        UnknownLayerError,
        f"no layer 'layers.0.mpl'; did you mean '{FIRST}'",
    ),
    ("tokens", {"tokens": [1]}, StatisticError, "tokens holds 1 numbers, not one for 2 layers"),
    ("tokens of none", {"tokens": {"x": 1}}, UnknownLayerError, "no layer 'x'"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [row[1:] for row in MISUSE], ids=[row[0] for row in MISUSE]
)
def test_one_wrong_layer_changes_nothing(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = build(OPTIONS, ALIKE)
    before = engine.state_dict()
    with pytest.raises(error, match=message):
        engine.observe_all(**{"routing": ok, "importance": ok, **changes})
    assert_same_state(engine.state_dict(), before)


def test_an_observed_layer_is_named_and_changes_nothing() -> None:
    engine = build(OPTIONS, ALIKE)
    engine.skip(SECOND)
    before = engine.state_dict()
    with pytest.raises(StepOrderError, match=f"'{SECOND}' was already observed in step 1"):
        engine.observe_all(routing=ok, importance=ok)
    assert_same_state(engine.state_dict(), before)


def test_layers_of_different_sizes_need_a_mapping() -> None:
    engine = build(OPTIONS, {"a": 2, "b": 3})
    with pytest.raises(StatisticError, match=r"'b', step 1: routing has shape \(2,\)"):
        engine.observe_all(routing=ok, importance=ok)
    engine.observe_all(
        routing={"b": np.ones(3), "a": np.ones(2)}, importance={"a": np.ones(2), "b": np.ones(3)}
    )
    assert engine.is_observed("a")
    with pytest.raises(LayoutError, match="comes too late"):
        engine.add_layer("c", 2)
