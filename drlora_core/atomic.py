"""Atomic writes: at every moment a path holds the old content or the new, whole and on disk.

Every writer of the package goes through this module. Content is written beside its place, flushed
to disk and renamed. A rename replaces a symbolic link itself, never the file behind it.

A process that is killed leaves its temporary files. The next one that writes to the same folder
deletes them: their names tell which process of which machine has made them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from drlora_core.locks import LOCK

PREFIX = ".drlora-"
CONFIGURATIONS = ("config.json", "adapter_config.json")  # no model or adapter loads without
BOOT = Path("/proc/sys/kernel/random/boot_id")
CANNOT_SYNC = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP}  # some network file systems


def write_file(path: Path, write: Callable[[Path], object], *, make_folder: bool = True) -> None:
    """Replace one file; the folder is made if it is missing, unless that would be wrong.

    ``write`` fills the temporary file whose path it is given. On any error, also one of ``write``,
    an older file is untouched.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    place = _temporary(path.parent, ".part")  # a folder: safetensors has temporary files of its own
    part = place / path.name
    try:
        _touch(part, path)
        mode = part.stat().st_mode  # that of the user's umask; safetensors would make it private
        write(part)
        part.chmod(mode)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _touch(part: Path, path: Path) -> None:
    """Make the temporary file; an error names the file that was to be written."""
    try:
        part.parent.mkdir()
        part.touch()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str, *, make_folder: bool = True) -> None:
    """Replace a text file, UTF-8."""
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"), make_folder=make_folder)


@contextlib.contextmanager
def replaced_files(folder: Path, stale: str | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving, its entries take their place in ``folder``.

    A ``folder`` that is missing appears whole. In one that is there, entries of the same names give
    way, and so do those that match the pattern ``stale`` (a checkpoint may have had more shards).
    They are deleted only once everything new is in place: on any error they come back, and
    ``folder`` is as it was: where it was missing, it and those around it are gone again. If the
    process is killed among these renames, the configuration is missing, without which no model or
    adapter loads, and the older files are in a folder ``.drlora-*.old`` beside the new ones.
    """
    there = folder.is_dir()
    around = folder if there else folder.parent  # the folder may be a disk of its own
    part = _temporary(around, ".part")
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        part.mkdir(parents=True)
        _sweep(around)
        yield part
        for file in part.rglob("*"):
            sync(file)
        if there:
            _exchange(part, folder, stale)
        else:
            os.replace(part, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for each in new:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise
    shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving, it appears as ``folder``, whole.

    Raises:
        OSError: ``folder`` is there already, and not empty.
    """
    part = _temporary(folder.parent, ".part")
    part.mkdir(parents=True)
    try:
        _sweep(part.parent)
        yield part
        os.rename(part, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete what killed processes have left in a folder, and in those inside it."""
    for parent in {left.parent for left in folder.rglob(f"{PREFIX}*.part")}:
        _sweep(parent)


def is_empty(folder: Path) -> bool:
    """True for a folder in which there is nothing but what a killed process has left."""
    return all(entry.name == LOCK or entry.name.startswith(PREFIX) for entry in folder.iterdir())


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
    new = sorted((entry.name for entry in part.iterdir()), key=CONFIGURATIONS.__contains__)
    old = {entry.name for entry in folder.glob(stale)} if stale else set()
    old |= {name for name in new if os.path.lexists(folder / name)}
    aside = _temporary(folder, ".old")
    aside.mkdir()
    first = sorted(old, key=CONFIGURATIONS.__contains__, reverse=True)
    moves = [(folder / name, aside / name) for name in first]
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
    _sweep(folder, ".old")


def _temporary(folder: Path, suffix: str) -> Path:
    """Name a temporary file or folder in a folder."""
    owner = f"{_machine()}-{os.getpid()}"
    return folder / f"{PREFIX}{owner}-{uuid.uuid4().hex[:12]}{suffix}"


def _sweep(folder: Path, suffix: str = ".part") -> None:
    """Delete what processes that have ended left in a folder; only those of this machine."""
    if os.name != "posix":
        return  # where asking for a process could end it
    for left in folder.glob(f"{PREFIX}{_machine()}-*{suffix}"):
        number = left.name.split("-")[2]
        if number.isdecimal() and not _lives(int(number)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@functools.cache
def _machine() -> str:
    """Tell machines apart that share a file system, and containers with processes of their own."""
    known = [platform.node()]
    with contextlib.suppress(OSError):
        known += [os.readlink("/proc/self/ns/pid"), BOOT.read_text()]
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:8]
