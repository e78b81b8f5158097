"""A recording whose writer was killed, or whose files were damaged, at any byte."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from drlora_core import DRLoRAError, LayoutError
from drlora_core.recording import Recording, RecordingWriter
from drlora_core.replay import first_difference, replay
from tests.core import recorded

zarr = pytest.importorskip("zarr")

ROWS = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a closed recording of 20 steps in chunks of 8."""
    path = tmp_path_factory.mktemp("crash") / "run"
    engine = recorded.build(recorded.config())
    engine.record_to(RecordingWriter(path, engine, chunk_steps=ROWS))
    recorded.drive(engine, 20)
    engine.record_to(None)
    return path


def opened(path: Path) -> Recording | str:
    """Return the recording, or the message with which it is refused."""
    try:
        return Recording.open(path)
    except LayoutError as error:
        return str(error)


def is_prefix(part: Recording, full: Recording) -> bool:
    """Whether a recording is the beginning of another, and says so if it is not all of it."""
    steps = part.steps
    np.testing.assert_array_equal(part.routing, full.routing[:steps])
    np.testing.assert_array_equal(part.importance, full.importance[:steps])
    assert part.ranks is not None
    assert full.ranks is not None
    np.testing.assert_array_equal(part.ranks, full.ranks[:steps])
    events = tuple(event for event in full.events if event.step <= steps)
    assert first_difference(part.events, events) is None
    return steps == full.steps or bool(part.notes)


def test_truncating_any_file_anywhere_is_never_silent(whole: Path, tmp_path: Path) -> None:
    full = Recording.open(whole)
    files = [file for file in whole.rglob("*") if file.is_file()]
    outcomes = {"same": 0, "shorter": 0, "refused": 0}
    for number, file in enumerate(files):
        size = file.stat().st_size
        for length in sorted({0, 1, size // 3, size // 2, size - 1}):
            copy = tmp_path / f"{number}-{length}"
            shutil.copytree(whole, copy)
            damaged = copy / file.relative_to(whole)
            damaged.write_bytes(file.read_bytes()[:length])
            part = opened(copy)
            if isinstance(part, str):
                assert str(copy) in part
                outcomes["refused"] += 1
            else:
                assert is_prefix(part, full)
                outcomes["same" if part.steps == full.steps else "shorter"] += 1
    assert outcomes["shorter"] > 10
    assert outcomes["refused"] > 10


def test_a_torn_last_chunk_loses_only_that_chunk(whole: Path, tmp_path: Path) -> None:
    full = Recording.open(whole)
    for name in ("routing", "importance", "ranks", "tokens", "presence"):
        copy = tmp_path / name
        shutil.copytree(whole, copy)
        chunk = copy / name / "c" / "2" / "0"
        chunk.write_bytes(chunk.read_bytes()[:-3])
        part = Recording.open(copy)
        assert part.steps == 16
        assert is_prefix(part, full)
        assert any("are lost" in note for note in part.notes)


def test_a_flipped_bit_is_found(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    chunk = copy / "routing" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(LayoutError, match=r"routing of the recording .* damaged between steps 1"):
        Recording.open(copy)


@pytest.mark.parametrize("name", ["routing", "importance", "ranks", "tokens", "presence"])
def test_a_missing_chunk_is_a_hole(whole: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    (copy / name / "c" / "1" / "0").unlink()
    with pytest.raises(DRLoRAError, match=r"step 9(:| is missing)"):
        Recording.open(copy)


def test_steps_beyond_the_commit_are_left_out_and_named(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    zarr.open_group(str(copy), mode="r+")["presence"].resize((11, 2))
    part = Recording.open(copy)
    assert part.steps == 11
    assert part.notes == ("steps after 11 were being written; they are left out",)


def test_foreign_stores_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recording at"):
        Recording.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(LayoutError, match="not a recording"):
        Recording.open(tmp_path / "file")
    zarr.create_group(str(tmp_path / "group"), zarr_format=3)
    with pytest.raises(LayoutError, match="not a recording of drlora"):
        Recording.open(tmp_path / "group")
    for field, value, message in [
        ("version", 2, "has version 2; this drlora reads 1"),
        ("layers", [{"name": "first"}], "attributes of .* are damaged"),
        ("layers", [{"name": "first", "experts": 5}], r"presence .* is uint8\[20, 2\]"),
        ("config", {"r_init": 0}, "attributes of .* are damaged"),
        ("chunk_steps", 0, "attributes of .* are damaged"),
    ]:
        copy = tmp_path / f"{field}-{value}"[:20]
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        metadata = json.loads((copy / "zarr.json").read_text())
        metadata["attributes"][field] = value
        (copy / "zarr.json").write_text(json.dumps(metadata))
        with pytest.raises(LayoutError, match=message):
            Recording.open(copy)


KILLED = """
import sys
from pathlib import Path
from tests.core import recorded
from drlora_core.recording import RecordingWriter
engine = recorded.build(recorded.config())
engine.record_to(RecordingWriter(Path(sys.argv[1]), engine, chunk_steps=2))
recorded.drive(engine, 100_000)
"""


def test_a_killed_writer_leaves_a_recording_that_replays(tmp_path: Path) -> None:
    lengths = []
    for attempt in range(3):
        path = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)])
        deadline = time.monotonic() + 60
        while not (path / "presence" / "c" / "10").exists():
            assert time.monotonic() < deadline
            time.sleep(0.003 * (attempt + 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        part = Recording.open(path)
        lengths.append(part.steps)
        assert any("not closed" in note for note in part.notes)
        assert first_difference(part.events, replay(part).events) is None
        engine = recorded.build(recorded.config())
        recorded.drive(engine, 18)
        engine.record_to(path)  # and the run can go on from an earlier state
        recorded.drive(engine, 2)
        engine.record_to(None)
        assert Recording.open(path).steps == 20
        assert Recording.open(path).notes == ()
    assert min(lengths) >= 20


ENDS = KILLED.replace("100_000", "5")


def test_an_interpreter_that_ends_writes_the_rest(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ENDS, str(tmp_path / "run")], check=True)
    recording = Recording.open(tmp_path / "run")
    assert recording.steps == 5
    assert recording.notes == ()
