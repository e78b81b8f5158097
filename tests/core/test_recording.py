"""Recordings hold what the engine saw; bad input is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import AllocationRequest, LayoutError, StatisticError, UnknownLayerError
from drlora_core.policies import rescored, walk
from drlora_core.recording import (
    Recording,
    RecordingWriter,
    writer,
)
from drlora_core.replay import first_difference
from tests.core import recorded


def arrays(**changes: Any) -> dict[str, Any]:
    """Arguments of from_arrays: 3 steps, layers of 2 and 3 experts."""
    values: dict[str, Any] = {
        "routing": {"a": np.full((3, 2), 0.5), "b": np.full((3, 3), 0.25)},
        "importance": {"a": np.ones((3, 2)), "b": np.ones((3, 3))},
    }
    return values | changes


def same(one: Recording, two: Recording) -> None:
    """Assert that two recordings hold the same, whatever their notes."""
    assert one.layers == two.layers
    assert one.config == two.config
    for name in ("routing", "importance", "presence", "tokens", "ranks", "dimensions"):
        ours, theirs = getattr(one, name), getattr(two, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    assert first_difference(one.events, two.events) is None


def test_a_recording_holds_the_samples_ranks_tokens_and_events(tmp_path: Path) -> None:
    engine, events = recorded.record(tmp_path / "run")
    recording = Recording.open(tmp_path / "run")
    assert recording.notes == ()
    assert recording.steps == 20
    assert recording.layers == recorded.LAYERS
    assert recording.config == engine.config
    assert recording.policy == "greedy"
    assert first_difference(events, recording.events) is None
    rng = np.random.default_rng([7, 9])
    first = recording.layer("first")
    np.testing.assert_array_equal(first.routing[8], rng.random(6))
    sample = rng.random((6, 8))
    assert first.ranks is not None
    np.testing.assert_array_equal(first.ranks[8], events[0].ranks["first"])
    means = [sample[i, :rank].mean() for i, rank in enumerate(first.ranks[8])]
    np.testing.assert_allclose(first.importance[8], means, rtol=1e-15)
    assert first.tokens.tolist() == list(range(1, 21))
    assert first.sampled.all()


def test_a_skipped_layer_is_recorded_as_skipped(tmp_path: Path) -> None:
    recorded.record(tmp_path / "run")
    second = Recording.open(tmp_path / "run").layer("second")
    assert (np.flatnonzero(~second.sampled) + 1).tolist() == [7, 14]
    assert np.isnan(second.routing[6]).all()
    assert second.routing_at(6) is None
    assert second.importance_at(6) is None
    assert second.tokens[6] == -1


class Reversed:
    """A policy that is an object and no function."""

    def __call__(self, request: AllocationRequest) -> np.ndarray:
        return walk(-request.saliency, request)


def test_the_policy_that_decided_is_named(tmp_path: Path) -> None:
    for policy, name in ((Reversed(), "Reversed"), (rescored, "rescored"), (None, "greedy")):
        engine = recorded.build(recorded.config(), policy=policy)
        engine.record_to(tmp_path / name)
        recorded.drive(engine, 1)
        engine.record_to(None)
        assert Recording.open(tmp_path / name).policy == name
    recorded.record(tmp_path / "prune", policy="prune", r_init=8)
    assert Recording.open(tmp_path / "prune").policy == "prune"


def test_saving_an_opened_recording_gives_the_same_again(tmp_path: Path) -> None:
    for policy, start in (("greedy", 2), ("prune", 8)):
        recorded.record(tmp_path / policy, policy=policy, r_init=start)
        recording = Recording.open(tmp_path / policy)
        recording.save(tmp_path / f"{policy}-copy")
        same(recording, Recording.open(tmp_path / f"{policy}-copy"))


def test_chunk_length_changes_nothing_but_the_files(tmp_path: Path) -> None:
    for rows in (1, 3, 64):
        engine = recorded.build(recorded.config())
        writer = RecordingWriter(tmp_path / str(rows), engine, chunk_steps=rows)
        engine.record_to(writer)
        recorded.drive(engine, 20)
        engine.record_to(None)
    reference = Recording.open(tmp_path / "64")
    for rows in (1, 3):
        same(reference, Recording.open(tmp_path / str(rows)))


@pytest.mark.parametrize("steps", [0, -1, 257])
def test_a_segment_length_out_of_range_is_refused(tmp_path: Path, steps: int) -> None:
    engine = recorded.build(recorded.config())
    with pytest.raises(LayoutError, match=f"chunk_steps is {steps}; accepted: 1 to 256"):
        RecordingWriter(tmp_path / "run", engine, chunk_steps=steps)


def test_it_is_readable_while_it_is_written(tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    writer = RecordingWriter(tmp_path / "run", engine, chunk_steps=8)
    engine.record_to(writer)
    recorded.drive(engine, 10)
    during = Recording.open(tmp_path / "run")
    assert during.steps == 8
    assert "not closed" in during.notes[0]
    assert [event.step for event in during.events] == [8]
    writer.flush()
    assert Recording.open(tmp_path / "run").steps == 10
    recorded.drive(engine, 10)
    engine.record_to(None)
    recorded.record(tmp_path / "reference")
    same(Recording.open(tmp_path / "reference"), Recording.open(tmp_path / "run"))


def test_saving_the_engine_state_flushes_the_recording(tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 5)
    engine.state_dict()
    engine.state_dict()  # nothing new to write
    assert Recording.open(tmp_path / "run").steps == 5
    recorded.drive(engine, 15)
    engine.record_to(None)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["00000001.npz", "00000006.npz", "recording.json"]
    recorded.record(tmp_path / "reference")
    same(Recording.open(tmp_path / "reference"), Recording.open(tmp_path / "run"))


def test_slow_steps_are_written_before_the_segment_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = recorded.build(recorded.config())
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 2)
    assert Recording.open(tmp_path / "run").steps == 0
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    recorded.drive(engine, 1)  # the next step writes those before it
    assert Recording.open(tmp_path / "run").steps == 2
    recorded.drive(engine, 3)
    assert Recording.open(tmp_path / "run").steps == 5
    engine.record_to(None)
    assert Recording.open(tmp_path / "run").steps == 6


@pytest.mark.parametrize("policy", ["greedy", "prune", "move"])
@pytest.mark.parametrize("stop", [3, 8, 13])
def test_a_resumed_engine_continues_its_recording(tmp_path: Path, stop: int, policy: str) -> None:
    changes: dict[str, Any] = {"policy": policy, "r_init": 8 if policy == "prune" else 2}
    changes["move_share"] = 1.0
    recorded.record(tmp_path / "reference", **changes)
    engine = recorded.build(recorded.config(**changes))
    engine.record_to(RecordingWriter(tmp_path / "run", engine, chunk_steps=4))
    recorded.drive(engine, stop)
    state = engine.state_dict()
    recorded.drive(engine, 3)  # steps that the checkpoint does not know
    engine.record_to(None)
    resumed = recorded.build(recorded.config(**changes))
    resumed.load_state_dict(state)
    resumed.record_to(tmp_path / "run")
    recorded.drive(resumed, 20 - stop)
    resumed.record_to(None)
    same(Recording.open(tmp_path / "reference"), Recording.open(tmp_path / "run"))


@pytest.mark.parametrize("start", [0, 4, 5])
def test_going_back_in_a_run_discards_the_steps_after(tmp_path: Path, start: int) -> None:
    recorded.record(tmp_path / "reference")
    engine = recorded.build(recorded.config())
    engine.record_to(RecordingWriter(tmp_path / "run", engine, chunk_steps=4))
    recorded.drive(engine, start)
    state = engine.state_dict()
    recorded.drive(engine, 11 - start)
    engine.load_state_dict(state)
    recorded.drive(engine, 1)
    during = Recording.open(tmp_path / "run")
    assert during.steps == start // 4 * 4 + (start == 5)
    recorded.drive(engine, 19 - start)
    engine.record_to(None)
    same(Recording.open(tmp_path / "reference"), Recording.open(tmp_path / "run"))


def test_a_path_that_is_taken_or_too_short_is_refused(tmp_path: Path) -> None:
    engine, _ = recorded.record(tmp_path / "run")
    fresh = recorded.build(recorded.config())
    fresh.record_to(tmp_path / "run")
    with pytest.raises(LayoutError, match="not empty"):
        recorded.drive(fresh, 1)
    engine.record_to(tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match="holds no recording"):
        recorded.drive(engine, 1)
    drifted = recorded.build(recorded.config())
    recorded.drive(drifted, 25)
    drifted.record_to(tmp_path / "run")
    with pytest.raises(LayoutError, match="ends at step 20, the engine is at step 25"):
        recorded.drive(drifted, 1)
    other = recorded.build(recorded.config(gamma=2.0))
    recorded.drive(other, 3)
    other.record_to(tmp_path / "run")
    with pytest.raises(LayoutError, match="another configuration"):
        recorded.drive(other, 1)
    assert Recording.open(tmp_path / "run").steps == 20


def test_a_step_that_the_disk_refused_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.record(tmp_path / "reference")
    engine = recorded.build(recorded.config())
    engine.record_to(RecordingWriter(tmp_path / "run", engine, chunk_steps=4))
    recorded.drive(engine, 8)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    for call in (lambda: recorded.drive(engine, 1), engine.step):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="no space left"):
                call()
        assert engine.step_count == 8
        assert Recording.open(tmp_path / "run").steps == 4
    engine.step()
    recorded.drive(engine, 11)
    engine.record_to(None)
    same(Recording.open(tmp_path / "reference"), Recording.open(tmp_path / "run"))


def test_a_forked_child_does_not_write(tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    writer = RecordingWriter(tmp_path / "run", engine)
    engine.record_to(writer)
    recorded.drive(engine, 3)
    writer._process += 1  # as in a child
    writer.close()
    assert Recording.open(tmp_path / "run").steps == 0
    writer._process -= 1
    engine.record_to(None)
    assert Recording.open(tmp_path / "run").steps == 3


def test_long_recordings_are_saved_in_several_segments(tmp_path: Path) -> None:
    routing = np.random.default_rng(0).random((600, 3))
    recording = Recording.from_arrays({"a": routing}, config=recorded.config())
    recording.save(tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["00000001.npz", "00000257.npz", "00000513.npz", "recording.json"]
    same(recording, Recording.open(tmp_path / "run"))
    with pytest.raises(LayoutError, match="is not empty; choose a new path"):
        recording.save(tmp_path / "run")


def test_wide_steps_make_short_segments(tmp_path: Path) -> None:
    engine = recorded.build(recorded.config(), {"wide": 200_000})
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 3)
    assert Recording.open(tmp_path / "run").steps == 2  # 2 steps of 20 bytes an expert: 8 MB
    engine.record_to(None)
    assert Recording.open(tmp_path / "run").steps == 3


def test_numpy_reads_a_segment(tmp_path: Path) -> None:
    recorded.record(tmp_path / "run", policy="prune", r_init=8)
    recording = Recording.open(tmp_path / "run")
    with np.load(tmp_path / "run" / "00000001.npz", allow_pickle=False) as segment:
        np.testing.assert_array_equal(segment["steps"]["routing"], recording.routing)
        np.testing.assert_array_equal(segment["steps"]["dimensions"], recording.dimensions)
        assert segment["events"]["step"].tolist() == [8, 12, 16]
        assert segment["events"]["cut"].shape == (3, 10, 8)


def test_dimensions_of_arrays_are_saved(tmp_path: Path) -> None:
    importance = np.random.default_rng(0).random((4, 2, 6))
    importance[2:, 1, 3] = np.nan  # cut
    recording = Recording.from_arrays(None, dimensions={"a": importance})
    recording.save(tmp_path / "run")
    same(recording, Recording.open(tmp_path / "run"))
    assert Recording.open(tmp_path / "run").layer("a").presence.tolist() == [9] * 4


def test_from_arrays_views_by_layer_and_read_only(tmp_path: Path) -> None:
    recording = Recording.from_arrays(**arrays(tokens=[5, 6, 7]))
    layer = recording.layer("b")
    assert layer.routing.shape == (3, 3)
    assert layer.tokens.tolist() == [5, 6, 7]
    assert layer.ranks is None
    with pytest.raises(ValueError, match="read-only"):
        layer.routing[0, 0] = 1.0
    recording.save(tmp_path / "saved")
    same(recording, Recording.open(tmp_path / "saved"))
    with pytest.raises(UnknownLayerError, match="no layer 'c'"):
        recording.layer("c")


NAN = np.array([[0.5, 0.5], [0.5, np.nan], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"routing": {"a": NAN, "b": np.ones((3, 3))}},
            StatisticError,
            r"'a', step 2: routing\[1\] is nan",
        ),
        (
            {"importance": {"a": np.ones((3, 2)), "b": -np.ones((3, 3))}},
            StatisticError,
            r"'b', step 1: importance\[0\] is -1",
        ),
        (
            {"importance": {"a": np.ones((3, 2)), "b": np.full((3, 3), np.inf)}},
            StatisticError,
            "is inf",
        ),
        (
            {"ranks": {"a": np.ones((3, 2)), "b": -np.ones((3, 3))}},
            StatisticError,
            r"'b', step 1: ranks\[0\] is -1",
        ),
        (
            {"ranks": {"a": np.full((3, 2), 1.5), "b": np.ones((3, 3))}},
            StatisticError,
            "whole numbers",
        ),
        (
            {"routing": {"a": np.ones((2, 2)), "b": np.ones((3, 3))}},
            LayoutError,
            r"'b': routing has shape \(3, 3\), not \(2, 3\)",
        ),
        ({"routing": {"b": np.ones((3, 3)), "a": np.ones((3, 2))}}, LayoutError, "same order"),
        (
            {"routing": {"a": np.ones(3)}, "importance": None},
            LayoutError,
            r"accepted: \[steps, experts\]",
        ),
        (
            {"routing": {"a": "x"}, "importance": None},
            StatisticError,
            "'a': routing is not an array",
        ),
        ({"routing": None, "importance": None}, LayoutError, "at least one layer"),
        ({"tokens": [1.5, 2.0, 3.0]}, LayoutError, "whole numbers"),
        ({"tokens": [1, 2]}, LayoutError, "whole numbers"),
        ({"tokens": [1, 2, -5]}, StatisticError, "step 3: tokens is -5"),
        (
            {"dimensions": {"a": np.ones((3, 2, 4)), "b": np.ones((3, 3, 5))}},
            LayoutError,
            r"'b': dimensions has shape \(3, 3, 5\), not \(3, 3, 4\)",
        ),
        (
            {"dimensions": {"a": np.ones((3, 2, 4)), "b": -np.ones((3, 3, 4))}},
            StatisticError,
            r"dimensions\[0, 0\] is -1",
        ),
    ],
)
def test_from_arrays_refuses(changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Recording.from_arrays(**arrays(**changes))
