"""A recording whose writer was killed, or whose files were damaged, at any byte."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import LayoutError
from drlora_core.recording import Recording, RecordingWriter
from drlora_core.recording.format import read_header
from drlora_core.replay import first_difference, replay
from tests.core import recorded

SEGMENTS = ["00000001.npz", "00000009.npz", "00000017.npz"]
HEADER = "recording.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a closed recording of 20 steps in segments of 8."""
    path = tmp_path_factory.mktemp("crash") / "run"
    engine = recorded.build(recorded.config())
    engine.record_to(RecordingWriter(path, engine, chunk_steps=8))
    recorded.drive(engine, 20)
    engine.record_to(None)
    assert sorted(file.name for file in path.iterdir()) == [*SEGMENTS, HEADER]
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """Return a copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def opened(path: Path) -> Recording | str:
    """Return the recording, or the message with which it is refused."""
    try:
        return Recording.open(path)
    except LayoutError as error:
        return str(error)


def assert_prefix(part: Recording, full: Recording) -> None:
    """Assert that a recording is the beginning of another, and says so if it is not all of it."""
    steps = part.steps
    np.testing.assert_array_equal(part.routing, full.routing[:steps])
    np.testing.assert_array_equal(part.importance, full.importance[:steps])
    assert part.ranks is not None
    assert full.ranks is not None
    np.testing.assert_array_equal(part.ranks, full.ranks[:steps])
    events = tuple(event for event in full.events if event.step <= steps)
    assert first_difference(part.events, events) is None
    assert steps == full.steps or part.notes


def test_truncating_any_file_anywhere_is_refused(copy: Path) -> None:
    for name in [*SEGMENTS, HEADER]:
        file = copy / name
        content = file.read_bytes()
        for length in {*range(0, len(content), 97), *range(len(content) - 30, len(content) - 1)}:
            file.write_bytes(content[:length])
            assert str(file) in str(opened(copy))
        file.write_bytes(content)
    assert Recording.open(copy).notes == ()


def test_a_flipped_bit_changes_nothing_silently(copy: Path, whole: Path) -> None:
    full, refused = Recording.open(whole), 0
    file = copy / SEGMENTS[1]
    content = file.read_bytes()
    for position in range(0, len(content), 13):
        damaged = bytearray(content)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        part = opened(copy)
        if isinstance(part, str):  # else it was, say, the date of a member
            assert str(file) in part
            refused += 1
        else:
            assert_prefix(part, full)
            assert part.steps == 20
    assert refused > len(content) / 13 * 0.7


def test_a_changed_header_is_refused(copy: Path) -> None:
    """Every byte of it, also where it stays valid."""
    content = (copy / HEADER).read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        if damaged[position : position + 1].isspace():
            continue
        (copy / HEADER).write_bytes(damaged)
        with pytest.raises(LayoutError, match=r"recording\.json is damaged"):
            read_header(copy)
    text = content.decode()
    for old, new in (('"seed": 0', '"seed": 1'), ('"first"', '"First"')):
        assert old in text
        (copy / HEADER).write_text(text.replace(old, new))
        with pytest.raises(LayoutError, match=r"checksum differs.* take 'checksum' out"):
            Recording.open(copy)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_segment_is_named_and_so_are_the_readable_steps(
    copy: Path, whole: Path, number: int
) -> None:
    file = copy / SEGMENTS[number]
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    message = str(opened(copy))
    assert f"segment {file} is damaged" in message
    steps = 8 * number
    moved = "move it and all later segments out of the folder"
    assert f"to read the {steps} steps before it, {moved}" in message
    for name in SEGMENTS[number:]:
        (copy / name).unlink()
    part = Recording.open(copy)
    assert part.steps == steps
    assert part.notes == (f"the recording was closed at step 20; it has {steps} steps",)
    if steps:
        assert_prefix(part, Recording.open(whole))


def test_a_missing_segment_is_a_hole(copy: Path) -> None:
    (copy / SEGMENTS[1]).unlink()
    with pytest.raises(LayoutError, match=r"00000017.* step 9, is missing.* the 8 steps before"):
        Recording.open(copy)


def test_what_a_killed_writer_left_of_a_file_is_ignored(copy: Path, whole: Path) -> None:
    (copy / ".drlora-0.part").write_bytes((copy / SEGMENTS[2]).read_bytes()[:100])
    assert Recording.open(copy).steps == 20


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def changed(path: Path, member: str = "steps", **changes: Any) -> bytes:
    """Return the segment with other fields in one of its arrays."""
    with np.load(path) as segment:
        arrays = dict(segment)
    old = arrays[member]
    columns = {name: changes.get(name, old[name]) for name in old.dtype.names}
    fields = [(name, values.dtype, values.shape[1:]) for name, values in columns.items()]
    arrays[member] = np.empty(len(old), fields)
    for name, values in columns.items():
        arrays[member][name] = values
    return npz(**arrays)


def longer(path: Path) -> bytes:
    with np.load(path) as segment:
        return npz(steps=np.zeros(10_000, segment["steps"].dtype), events=segment["events"])


def lying_size(path: Path) -> bytes:
    """The same, but the archive says that the member is small."""
    content = longer(path)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = archive.getinfo("steps.npy").file_size.to_bytes(4, "little")
    assert size in content
    return content.replace(size, (256).to_bytes(4, "little"))


def compressed(path: Path, method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(file, "w", method) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return file.getvalue()


def lying_shape(path: Path) -> bytes:
    """An array that says to be larger than its file."""
    file = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "steps.npy":
                assert b"(8,), }         " in content
                content = content.replace(b"(8,), }         ", b"(8000000000,), }")
            target.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda path: b"foreign", "BadZipFile"),
        (lambda path: b"", "BadZipFile"),
        (lambda path: npz(routing=np.zeros((8, 10))), "no item named 'steps.npy'"),
        (longer, r"steps are compressed or have more than \d+ bytes"),
        (lying_size, "Bad CRC-32 for file 'steps.npy'"),
        (lying_shape, "MemoryError|ValueError"),
        (lambda path: compressed(path, zipfile.ZIP_DEFLATED), "steps are compressed"),
        (lambda path: compressed(path, zipfile.ZIP_BZIP2), "steps are compressed"),
        (lambda path: npz(steps=np.array([{}] * 8)), "Object arrays cannot be loaded"),
        (lambda path: npz(steps=np.array(0.0)), r"steps are float64\[\], not \[\('routing'"),
        (
            lambda path: changed(path, routing=np.zeros((8, 10), np.float32)),
            r"steps are \[\('routing', '<f4', \(10,\)\),.* not \[\('routing', '<f8', \(10,\)",
        ),
        (
            lambda path: changed(path, routing=np.zeros((8, 9))),
            r"steps are \[\('routing', '<f8', \(9,\)\),.* not \[\('routing', '<f8', \(10,\)",
        ),
        (
            lambda path: changed(path, "events", step=np.array([12, 17])),
            r"events after steps \[12, 17\]",
        ),
    ],
)
def test_a_foreign_segment_is_refused(
    copy: Path, made: Callable[[Path], bytes], message: str
) -> None:
    path = copy / SEGMENTS[1]
    path.write_bytes(made(path))
    with pytest.raises(LayoutError, match=message) as error:
        Recording.open(copy)
    assert f"segment {path} is damaged" in str(error.value)


def test_a_value_that_no_run_records_is_named(copy: Path) -> None:
    path = copy / SEGMENTS[1]
    path.write_bytes(changed(path, routing=np.full((8, 10), -1.0)))
    with pytest.raises(ValueError, match=r"layer 'first', step 9: routing\[0\] is -1"):
        Recording.open(copy)


def test_foreign_folders_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recording at"):
        Recording.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(LayoutError, match="not a recording"):
        Recording.open(tmp_path / "file")
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr" / "zarr.json").write_text("{}")
    with pytest.raises(LayoutError, match="Zarr, which this version no longer reads"):
        Recording.open(tmp_path / "zarr")
    header = json.loads((copy / HEADER).read_text())
    del header["checksum"]  # as in older recordings
    for field, value, message in [
        ("version", 3, "version: Input should be 2"),
        ("format", "other", "format: Input should be 'drlora-recording'"),
        ("layers", {"first": 0}, r"layers\.first: Input should be greater than or equal to 1"),
        ("layers", {}, "layers: .* at least 1 item"),
        ("layers", {"first": 5}, r"segment .* is damaged .*steps are .*\(10,\)"),
        ("config", {"r_init": -1}, "config"),
        ("more", 0, "more: Extra inputs"),
    ]:
        (copy / HEADER).write_text(json.dumps(header | {field: value}))
        with pytest.raises(LayoutError, match=message):
            Recording.open(copy)
    (copy / HEADER).write_text("[]")
    with pytest.raises(LayoutError, match=r"recording\.json is damaged"):
        Recording.open(copy)


def test_a_recording_that_cannot_be_continued_stays_as_it_is(copy: Path) -> None:
    (copy / SEGMENTS[1]).write_bytes(b"damaged")
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    engine = recorded.build(recorded.config())
    recorded.drive(engine, 18)
    engine.record_to(copy)
    with pytest.raises(LayoutError, match=r"00000009\.npz is damaged"):
        recorded.drive(engine, 1)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    engine = recorded.build(recorded.config())
    recorded.drive(engine, 5)
    engine.record_to(copy)  # the damaged segment holds later steps only
    recorded.drive(engine, 15)
    engine.record_to(None)
    assert Recording.open(copy).steps == 20
    assert Recording.open(copy).notes == ()


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
        while not (path / "00000021.npz").exists():
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


def test_a_reader_never_meets_half_a_segment(tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)])
    try:
        deadline, steps = time.monotonic() + 60, 0
        while steps < 40:
            assert time.monotonic() < deadline
            if (path / HEADER).exists():
                part = Recording.open(path)
                assert part.steps >= steps
                steps = part.steps
    finally:
        process.kill()
        process.wait()
