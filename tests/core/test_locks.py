"""One process writes into a folder; a killed one is in nobody's way."""

from __future__ import annotations

import copy
import errno
import fcntl
import importlib.util
import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from drlora_core import LayoutError, locks
from drlora_core.locks import LOCK, FolderLock
from drlora_core.recording import Recording, RecordingWriter
from tests.core import recorded


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        FolderLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    FolderLock(tmp_path).release()


def test_a_forked_process_does_not_release_the_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path)
    lock.release()


@pytest.mark.parametrize("again", [True, False], ids=["another took it", "it is free"])
def test_a_file_that_its_last_owner_deletes_is_no_lock(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its opening and its locking, the file may go, and be made anew."""
    calls, take = [], fcntl.flock

    def late(handle: int, how: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
            if again:
                (tmp_path / LOCK).touch()
        take(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = FolderLock(tmp_path)
    assert len(calls) == 2
    with pytest.raises(BlockingIOError):
        FolderLock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_on_windows_there_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "register_at_fork")
    spec = importlib.util.spec_from_file_location("drlora_core.locks", locks.__file__)
    assert spec is not None
    assert spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    both = [elsewhere.FolderLock(tmp_path) for _ in range(2)]
    assert list(tmp_path.iterdir()) == []
    for lock in both:
        lock.release()
    elsewhere._forget_all()  # as a child would, with no lock to leave


def test_where_nothing_can_be_locked_writers_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems; what else goes wrong is raised."""

    def refuse(code: int) -> None:
        def flock(handle: int, how: int) -> None:
            raise OSError(code, "refused")

        monkeypatch.setattr(fcntl, "flock", flock)

    for code in (errno.ENOSYS, errno.ENOLCK):
        refuse(code)
        both = [FolderLock(tmp_path) for _ in range(2)]
        assert not any(lock.is_lost for lock in both)
        for lock in both:
            lock.release()
    refuse(errno.EIO)
    with pytest.raises(OSError, match="refused"):
        FolderLock(tmp_path)


def test_children_of_a_killed_process_hold_no_lock(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:
        lock = FolderLock(tmp_path)
        worker = os.fork()
        if worker == 0:
            os.write(writing, str(os.getpid()).encode())
            signal.pause()
        while lock:
            time.sleep(1.0)
    worker = int(os.read(reading, 20))
    try:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        FolderLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_two_engines_do_not_record_into_one_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = recorded.build(recorded.config())
    first.record_to(path)
    recorded.drive(first, 5)
    second = recorded.build(recorded.config())
    second.load_state_dict(first.state_dict())
    second.record_to(path)
    with pytest.raises(LayoutError, match=rf"another engine records to '{path}' .*; end that with"):
        recorded.drive(second, 1)
    recorded.drive(first, 3)
    first.record_to(None)
    second.load_state_dict(first.state_dict())
    recorded.drive(second, 2)
    second.record_to(None)
    assert Recording.open(path).steps == 10
    assert not (path / LOCK).exists()


def test_an_engine_that_nobody_has_any_more_holds_no_lock(tmp_path: Path) -> None:
    """As where a cell of a notebook is run again."""
    engine = recorded.build(recorded.config())
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 5)
    state = engine.state_dict()
    del engine
    again = recorded.build(recorded.config())
    again.load_state_dict(state)
    again.record_to(tmp_path / "run")
    recorded.drive(again, 1)
    again.record_to(None)
    assert Recording.open(tmp_path / "run").steps == 6


def test_a_copy_of_an_engine_has_no_part_in_the_lock(tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 5)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        with pytest.raises(LayoutError, match="another engine records to"):
            recorded.drive(other, 1)
        del other
    recorded.drive(engine, 1)
    engine.record_to(None)
    assert Recording.open(tmp_path / "run").steps == 6


def test_a_run_that_was_killed_after_its_last_step_completes_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "run"
    child = os.fork()
    if child == 0:
        engine = recorded.build(recorded.config())
        engine.record_to(path)
        recorded.drive(engine, 5)
        engine.state_dict()  # which writes the steps
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert any("not closed" in note for note in Recording.open(path).notes)
    for steps in (4, 5):  # an engine that has gone elsewhere changes nothing
        engine = recorded.build(recorded.config())
        recorded.drive(engine, steps)
        engine.record_to(RecordingWriter(path, engine))
        engine.record_to(None)
        assert bool(Recording.open(path).notes) == (steps == 4)
    assert not (path / LOCK).exists()


def test_a_recording_that_was_deleted_does_not_begin_in_the_middle(tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 5)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(LayoutError, match="was deleted while it was written"):
        engine.record_to(None)
    engine.record_to(None)
    assert not (tmp_path / "run").exists()


def test_a_recording_that_another_one_has_made_anew_is_left_alone(tmp_path: Path) -> None:
    first = recorded.build(recorded.config())
    first.record_to(tmp_path / "run")
    recorded.drive(first, 5)
    shutil.rmtree(tmp_path / "run")
    recorded.record(tmp_path / "run", steps=3)
    with pytest.raises(LayoutError, match="was deleted while it was written"):
        first.record_to(None)
    assert Recording.open(tmp_path / "run").steps == 3


def test_an_engine_that_is_dropped_after_its_recording_was_deleted_says_nothing(
    tmp_path: Path,
) -> None:
    engine = recorded.build(recorded.config())
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 5)
    shutil.rmtree(tmp_path / "run")
    del engine  # an error in here would be a warning, and those are errors in these tests


def test_a_copy_in_another_process_goes_on_with_the_recording(tmp_path: Path) -> None:
    engine = recorded.build(recorded.config())
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 5)
    stored, state = pickle.dumps(engine), engine.state_dict()
    engine.record_to(None)
    child = os.fork()
    if child == 0:
        other = pickle.loads(stored)
        other.load_state_dict(state)
        recorded.drive(other, 2)
        other.record_to(None)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert Recording.open(tmp_path / "run").steps == 7
    assert not (tmp_path / "run" / LOCK).exists()
