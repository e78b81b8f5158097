"""Data frames hold the engine's own numbers; without pandas they say what to install."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from drlora_core import AllocatorConfig, AllocatorEngine, DRLoRAError, Recording
from drlora_core.frames import events_frame
from tests.core import recorded

STATE = ["layer", "expert", "rank", "routing_frequency", "rank_importance", "saliency"]
EVENTS = ["event", "step", "layer", "expert", "delta", "rank", "saliency"]


def test_a_frame_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    engine = recorded.build(recorded.config())
    with pytest.raises(DRLoRAError, match="pip install pandas"):
        engine.to_frame()
    with pytest.raises(DRLoRAError, match="pip install pandas"):
        Recording.from_arrays({"a": np.ones((1, 2))}).events_frame()


def test_frames_hold_the_numbers_of_the_engine(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    engine, events = recorded.record(tmp_path / "run", steps=14)
    frame = engine.to_frame()
    assert list(frame) == STATE
    for name in engine.layer_names:
        rows = frame[frame["layer"] == name]
        assert rows["expert"].tolist() == list(range(engine.num_experts(name)))
        np.testing.assert_array_equal(rows["rank"], engine.ranks(name))
        for column in STATE[3:]:
            np.testing.assert_array_equal(rows[column], getattr(engine, column)(name))

    frame = Recording.open(tmp_path / "run").events_frame()
    assert list(frame) == EVENTS
    assert len(frame) == 2 * 10
    for event in events:
        rows = frame[(frame["event"] == event.index) & (frame["layer"] == "second")]
        assert set(rows["step"]) == {event.step}
        for column, field in (("delta", "deltas"), ("rank", "ranks"), ("saliency", "saliency")):
            np.testing.assert_array_equal(rows[column], getattr(event, field)["second"])


def test_a_frame_is_a_copy() -> None:
    pytest.importorskip("pandas")
    engine = recorded.build(recorded.config())
    frame = engine.to_frame()
    frame["rank"] += 1
    assert engine.ranks("first").tolist() == [2] * 6


def test_empty_frames_have_their_columns() -> None:
    pytest.importorskip("pandas")
    frame = AllocatorEngine(AllocatorConfig()).to_frame()
    assert (list(frame), len(frame)) == (STATE, 0)
    frame = events_frame([])
    assert (list(frame), len(frame)) == (EVENTS, 0)
    assert [frame[name].dtype.kind for name in ("step", "delta", "saliency")] == ["i", "i", "f"]
