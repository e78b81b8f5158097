"""A run that was saved and loaded, at any step, goes on to the same last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import AllocatorEngine
from tests.core.comparison import (
    assert_same_events,
    assert_same_state,
    build,
    feed,
    give,
    through_files,
)
from tests.strategies import layers, make_samples, options, seeds, styles

any_run = options(scopes=("layer", "global"))


@given(any_run, layers(), seeds, styles, st.data())
def test_resumed_between_two_samples_equals_uninterrupted(
    options: dict[str, Any], layers: dict[str, int], seed: int, style: str, data: st.DataObject
) -> None:
    """The cut lies anywhere, also between observe and step; the state goes through files."""
    samples = make_samples(options, layers, seed, style, steps=options["growth_end"] + 2)
    whole = build(options, layers)
    expected = feed(whole, samples)

    cut = data.draw(st.integers(0, len(samples) - 1), label="steps before the cut")
    seen = data.draw(st.integers(0, len(layers)), label="layers of the next step before the cut")
    first = build(options, layers)
    events = feed(first, samples[:cut])
    names = list(layers)
    for name in names[:seen]:
        give(first, name, samples[cut][name])
    knows_layers = data.draw(st.booleans(), label="layers added before loading")
    second = build(options, layers if knows_layers else {})
    state = first.state_dict()
    second.load_state_dict(through_files(state))
    assert_same_state(second.state_dict(), state)
    for name in names[seen:]:
        give(second, name, samples[cut][name])
    events += [second.step(), *feed(second, samples[cut + 1 :])]
    assert_same_events(events, expected)
    assert_same_state(second.state_dict(), whole.state_dict())


@given(any_run, layers(), seeds)
def test_saved_state_is_independent_of_the_engine(
    options: dict[str, Any], layers: dict[str, int], seed: int
) -> None:
    samples = make_samples(options, layers, seed, "generic", options["growth_end"])
    engine = build(options, layers)
    feed(engine, samples[:1])
    state = engine.state_dict()
    copy = through_files(state)
    expected = feed(engine, samples[1:])
    assert_same_state(state, copy)
    engine.load_state_dict(state)  # back in time, on the same engine
    assert_same_events(feed(engine, samples[1:]), expected)
    assert_same_state(state, copy)


@given(any_run, layers(), seeds, styles)
def test_same_samples_give_the_same_events(
    options: dict[str, Any], layers: dict[str, int], seed: int, style: str
) -> None:
    samples = make_samples(options, layers, seed, style, options["growth_end"])
    first, second = build(options, layers), build(options, layers)
    assert_same_events(feed(first, samples), feed(second, samples))
    assert_same_state(first.state_dict(), second.state_dict())


def test_state_of_plain_lists_is_read_too() -> None:
    """JSON alone is enough: lists of numbers become the arrays they were."""
    options: dict[str, Any] = {
        "r_init": 1,
        "r_target": 2,
        "r_max": 3,
        "warmup_steps": 0,
        "growth_interval": 1,
    }
    options |= {"growth_end": 4}
    engine = build(options, {"a": 3})
    feed(engine, make_samples(options | {"policy": "greedy"}, {"a": 3}, 0, "generic", 2))
    state = engine.state_dict()
    lists = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in state["layers"]["a"].items()
    }
    other = AllocatorEngine(engine.config)
    other.load_state_dict(state | {"layers": {"a": lists}})
    assert_same_state(other.state_dict(), state)
