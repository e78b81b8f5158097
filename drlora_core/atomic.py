"""Atomic writes: at every moment a path holds the old content or the new, whole and on disk.

Every writer of the package goes through this module. Content is written beside its place, flushed
to disk and renamed. A rename replaces a symbolic link itself, never the file behind it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

CANNOT_SYNC = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP}  # some network file systems


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace one file; the folder is made if it is missing.

    ``write`` fills the temporary file whose path it is given. On any error, also one of ``write``,
    an older file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path, ".part")
    try:
        _touch(part, path)
        mode = part.stat().st_mode  # that of the user's umask; safetensors would make it private
        write(part)
        part.chmod(mode)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _touch(part: Path, path: Path) -> None:
    """Make the temporary file; an error names the file that was to be written."""
    try:
        part.touch()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file, UTF-8."""
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def replaced_files(folder: Path, stale: str | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving, its entries take their place in ``folder``.

    Older entries of the same names give way, and so do those that match the pattern ``stale`` (a
    checkpoint may have had more shards). They are deleted only once everything new is in place: on
    any error they come back, and ``folder`` is as it was: where it was missing, it and those around
    it are gone again.
    """
    part = _beside(folder, ".part")
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.rglob("*"):
            sync(file)
        _exchange(part, folder, stale)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for each in new:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise
    shutil.rmtree(part, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk; a folder only where the system can.

    Windows cannot open folders, and flushes only what was opened for writing.
    """
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not (is_folder and error.errno in CANNOT_SYNC):
            raise
    finally:
        os.close(handle)


def _exchange(part: Path, folder: Path, stale: str | None) -> None:
    """Move the entries of ``part`` into ``folder``; on an error undo every move."""
    folder.mkdir(parents=True, exist_ok=True)
    new = sorted(entry.name for entry in part.iterdir())
    old = {entry.name for entry in folder.glob(stale)} if stale else set()
    old |= {name for name in new if os.path.lexists(folder / name)}
    aside = _beside(folder, ".old")
    aside.mkdir()
    moves = [(folder / name, aside / name) for name in sorted(old)]
    moves += [(part / name, folder / name) for name in new]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
        sync(folder)
    except BaseException:
        for source, target in reversed(done):  # an error here leaves the old files in `aside`
            os.replace(target, source)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.parent / f".drlora-{uuid.uuid4().hex}{suffix}"
