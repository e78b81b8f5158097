"""A write that fails at any point leaves what was there, and nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from drlora_core import atomic


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.*")}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "deep" / "a.txt", "old")
    atomic.write_text(tmp_path / "deep" / "a.txt", "new")
    assert content(tmp_path) == {"deep/a.txt": "new"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a.txt", "old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write_file(tmp_path / "a.txt", fail)
    assert content(tmp_path) == {"a.txt": "old"}


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target.txt").write_text("precious")
    (tmp_path / "link.txt").symlink_to(tmp_path / "target.txt")
    atomic.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "target.txt").read_text() == "precious"
    assert not (tmp_path / "link.txt").is_symlink()


def write_model(folder: Path, text: str, shards: int) -> None:
    with atomic.replaced_files(folder, "model*") as part:
        for shard in range(shards):
            (part / f"model-{shard}.txt").write_text(text)
        (part / "config.txt").write_text(text)


def test_files_are_replaced_together_and_stale_ones_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_model(folder, "old", shards=3)
    (folder / "notes.txt").write_text("mine")
    write_model(folder, "new", shards=1)
    assert content(folder) == {"config.txt": "new", "model-0.txt": "new", "notes.txt": "mine"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("call", range(7))
def test_an_error_while_files_are_exchanged_undoes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Four old files move aside and three new ones in: each of these renames fails once."""
    folder = tmp_path / "run"
    write_model(folder, "old", shards=3)
    before = content(folder)
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == call + 1:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        write_model(folder, "new", shards=2)
    assert len(calls) > call
    assert content(folder) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def dead() -> int:
    """Number of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_what_killed_processes_of_this_machine_left_is_deleted(tmp_path: Path) -> None:
    own = f"{atomic.PREFIX}{atomic._machine()}"
    gone = [f"{own}-{dead()}-0.part", f"{own}-{dead()}-1.part"]
    kept = [f"{own}-{os.getpid()}-2.part", f"{own}-1-3.part", f".drlora-00000000-{dead()}-4.part"]
    for name in [*gone[:1], *kept]:
        (tmp_path / name).write_text("half")
    (tmp_path / gone[1] / "deep").mkdir(parents=True)
    assert atomic.is_empty(tmp_path)
    atomic.write_text(tmp_path / "a.txt", "new")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.txt", *kept}
    assert not atomic.is_empty(tmp_path)
    (tmp_path / "deep" / gone[1]).mkdir(parents=True)
    atomic.sweep(tmp_path)
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("error", [PermissionError, OverflowError])
def test_what_may_be_another_process_s_is_kept(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of another user may not be asked, and a number may be none of this system."""
    left = tmp_path / f"{atomic.PREFIX}{atomic._machine()}-{dead()}-0.part"
    left.touch()

    def refuse(process: int, number: int) -> None:
        raise error

    monkeypatch.setattr(os, "kill", refuse)
    atomic.sweep(tmp_path)
    assert left.exists()
    monkeypatch.undo()
    atomic.sweep(tmp_path)
    assert not left.exists()


def test_on_windows_no_process_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f"{atomic.PREFIX}{atomic._machine()}-{dead()}-0.part"
    left.touch()
    asked: list[int] = []
    monkeypatch.setattr(os, "kill", lambda process, number: asked.append(process))
    monkeypatch.setattr(os, "name", "nt")
    atomic._sweep(tmp_path)
    monkeypatch.undo()
    assert left.exists()
    assert asked == []


def test_a_configuration_goes_first_and_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed on the way leaves files that nobody reads."""
    for text in ("old", "new"):
        moved, replace = [], os.replace

        def note(source: Path, target: Path, replace: Any = replace, moved: Any = moved) -> None:
            replace(source, target)
            moved.append((Path(target).parent == tmp_path / "run", Path(target).name))

        monkeypatch.setattr(os, "replace", note)
        with atomic.replaced_files(tmp_path / "run") as part:
            for name in ("adapter_config.json", "generation_config.json", "weights", "zero"):
                (part / name).write_text(text)
        monkeypatch.undo()
        if text == "old":
            assert moved == [(False, "run")], "a new folder appears whole"
    assert moved[0] == (False, "adapter_config.json")
    assert moved[-1] == (True, "adapter_config.json")
    assert len(moved) == 8
    assert {file.read_text() for file in (tmp_path / "run").iterdir()} == {"new"}


def test_a_folder_that_is_there_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    with atomic.new_folder(tmp_path / "deep" / "run") as part:
        (part / "a.txt").write_text("first")
    with pytest.raises(OSError, match="not empty"), atomic.new_folder(tmp_path / "deep/run"):
        pass
    assert content(tmp_path) == {"deep/run/a.txt": "first"}


def test_windows_opens_no_folder_and_flushes_only_what_it_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("new")
    opened, real = [], os.open

    def windows_open(path: Path, flags: int) -> int:
        if path.is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        opened.append(flags)
        return real(path, flags)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "name", "nt")
    atomic.sync(tmp_path)
    atomic.sync(file)
    monkeypatch.undo()
    assert opened == [os.O_RDWR]


@pytest.mark.parametrize("place", [".", "a.txt"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_only_folders_may_be_left_unflushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    """Some network file systems flush no folder; a real error is one, also there."""
    (tmp_path / "a.txt").write_text("new")

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if (place, number) == (".", errno.EINVAL):
        atomic.sync(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            atomic.sync(tmp_path / place)


def test_a_file_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").touch()

    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        atomic.sync(tmp_path / "a.txt")
