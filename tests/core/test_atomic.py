"""A write that fails at any point leaves what was there, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

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
