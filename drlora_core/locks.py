"""A lock on a folder: of all processes of this machine, one writes into it."""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path
from typing import Any

try:
    import fcntl as _fcntl
except ImportError:  # Windows has no locks that end with their process
    fcntl: Any = None
else:
    fcntl = _fcntl

CANNOT_LOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
"""Some network file systems have no locks; writers go on without, as on Windows."""
LOCK = ".lock"
"""The file in the folder; what counts is not that it exists, but that a process holds it."""


class FolderLock:
    """Keeps others from writing into a folder, until it is released or the process ends.

    A lock of a process that was killed stands in nobody's way. Without ``fcntl`` (on Windows), and
    on file systems that cannot lock, there is no lock.

    Args:
        folder: it must exist.

    Raises:
        BlockingIOError: another one holds the lock, in this process or in another.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lock = FolderLock(Path(folder))
        ...     lock.release()
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / LOCK
        self._handle = -1
        while self._handle < 0 and fcntl is not None:
            handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at_its_place(handle):
                    self._handle, handle = handle, -1
            except OSError as error:
                if error.errno not in CANNOT_LOCK:
                    raise
                break
            finally:
                if handle >= 0:
                    os.close(handle)
        _HELD.add(self)

    @property
    def is_lost(self) -> bool:
        """True if somebody has deleted the folder, which may be another's by now."""
        return self._handle >= 0 and not self._is_at_its_place(self._handle)

    def release(self) -> None:
        """Let others write."""
        if self._handle >= 0:
            if not self.is_lost:
                with contextlib.suppress(OSError):
                    self._file.unlink()  # before the lock is free: it may be another's then
            self._forget()

    def _forget(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _is_at_its_place(self, handle: int) -> bool:
        """False if its last owner has deleted the file in the meantime."""
        try:
            return os.path.samestat(os.fstat(handle), self._file.stat())
        except FileNotFoundError:
            return False


_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_all() -> None:
    """Leave the locks to the process that took them: they end with it, not with its children."""
    for lock in _HELD:
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
