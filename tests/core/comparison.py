"""Run the engine and the reference side by side, and small helpers that the tests share."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

from drlora_core import AllocatorConfig, AllocatorEngine, GrowthEvent
from tests import reference
from tests.strategies import Samples


def build(options: dict[str, Any], layers: dict[str, int], **engine: Any) -> AllocatorEngine:
    made = AllocatorEngine(AllocatorConfig(**options), **engine)
    for name, size in layers.items():
        made.add_layer(name, size)
    return made


def feed(engine: AllocatorEngine, samples: Samples) -> list[GrowthEvent | None]:
    """Give an engine the samples of some steps; its events."""
    events = []
    for step in samples:
        for name, sample in step.items():
            give(engine, name, sample)
        events.append(engine.step())
    return events


def give(engine: AllocatorEngine, name: str, sample: tuple[Any, Any]) -> None:
    if sample == (None, None):
        engine.skip(name)
    else:
        engine.observe(name, routing=sample[0], importance=sample[1])


def assert_same_decisions(
    options: dict[str, Any], layers: dict[str, int], samples: Samples
) -> tuple[int, int]:
    """Every statistic and decision of the engine is that of the reference, step by step.

    Returns:
        The events compared, and 1 if the run was left early because an event hangs on rounding.
    """
    engine = build(options, layers)
    plain = reference.Engine(engine.config.model_dump())
    for name, size in layers.items():
        plain.add_layer(name, size)
    events = 0
    for sample in samples:
        for name, (routing, importance) in sample.items():
            give(engine, name, (routing, importance))
            plain.layers[name].observe(routing, importance)
        assert_same_statistics(engine, plain)
        event, expected = engine.step(), plain.step()
        assert (event is None) == (expected is None), f"step {plain.t}: {event} and {expected}"
        if event is None or expected is None:
            continue
        if expected.undecided or any(
            reference.near_tie(s.tolist()) for s in event.saliency.values()
        ):
            return events, 1
        assert_same_event(event, expected, plain)
        events += 1
    return events, 0


def assert_same_statistics(engine: AllocatorEngine, plain: reference.Engine) -> None:
    for name, layer in plain.layers.items():
        assert engine.ranks(name).tolist() == layer.ranks
        assert_close(engine.routing_frequency(name), layer.routing_frequency())
        assert_close(engine.rank_importance(name), layer.rank_importance())
        assert_close(engine.saliency(name), layer.saliency())


def assert_close(values: Any, expected: list[float]) -> None:
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=0.0)


def assert_same_event(
    event: GrowthEvent, expected: reference.Event, plain: reference.Engine
) -> None:
    assert event.step == expected.step
    assert event.unplaced == expected.unplaced
    assert set(event.deltas) == set(expected.deltas)
    for name, deltas in expected.deltas.items():
        assert event.deltas[name].tolist() == deltas, f"step {event.step}, {name}"
        assert event.ranks[name].tolist() == plain.layers[name].ranks
        if name in expected.cut:
            assert set(map(tuple, np.argwhere(event.cut[name]).tolist())) == expected.cut[name]
        assert_close(event.saliency[name], expected.saliency[name])


def assert_same_state(state: Any, expected: Any, where: str = "state") -> None:
    """Equal to the last bit, dtypes included."""
    assert type(state) is type(expected), where
    if isinstance(expected, dict):
        assert list(state) == list(expected), where
        for key, value in expected.items():
            assert_same_state(state[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, np.ndarray):
        assert state.dtype == expected.dtype, where
        assert state.shape == expected.shape, where
        assert state.tobytes() == expected.tobytes(), where
    else:
        assert state == expected, where


def assert_same_events(
    events: list[GrowthEvent | None], expected: list[GrowthEvent | None]
) -> None:
    """Equal to the last bit."""
    assert len(events) == len(expected)
    for event, other in zip(events, expected, strict=True):
        assert (event is None) == (other is None)
        if event is None or other is None:
            continue
        for field in ("step", "index", "unplaced"):
            assert getattr(event, field) == getattr(other, field)
        for field in ("deltas", "ranks", "saliency", "cut"):
            assert_same_state(getattr(event, field), getattr(other, field), field)


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """Write a state as JSON and one .npz file, and read it back (nothing is pickled)."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def strip(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays[f"a{len(arrays)}"] = value
            return {"array": f"a{len(arrays) - 1}"}
        return (
            {key: strip(item) for key, item in value.items()} if isinstance(value, dict) else value
        )

    text = json.dumps(strip(state), allow_nan=False)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:

        def restore(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            if set(value) == {"array"}:
                return loaded[value["array"]]
            return {key: restore(item) for key, item in value.items()}

        restored: dict[str, Any] = restore(json.loads(text))
    return restored
