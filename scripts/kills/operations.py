"""The operations of a process on the files below a folder, and what happens at one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "shutil.rmtree",
}  # fmt: skip
NATIVE = (("torch", "save", 1), ("safetensors.torch", "serialize_file", 1))
"""Functions that write a file without Python: their module, their name, and where the path is."""


class Operations:
    """Counts operations that change files below a folder, and calls ``at`` before each.

    Python's own are seen by an audit hook, which cannot be taken away again: this is for a process
    that will soon end. ``os.fsync`` and functions that write natively are wrapped.

    Args:
        folder: only what is below it counts.
        at: told the number of each operation, from 1 on; it may raise, or end the process.
    """

    def __init__(self, folder: Path, at: Callable[[int], None]) -> None:
        self.count = 0
        self._folder, self._at = os.fspath(folder.resolve()), at
        self._inside = False
        self._owner = os.getpid()

    def install(self) -> None:
        """See every operation from now on."""
        sys.addaudithook(self._audit)
        self._wrap_fsync()
        for module, name, place in NATIVE:
            if (found := sys.modules.get(module)) is not None:
                self._wrap(found, name, place)

    def happen(self, path: Any, *, relative: bool = False) -> None:
        """Count an operation, if it is one on the files below the folder."""
        if self._inside or os.getpid() != self._owner:
            return
        if not relative and not _text(path).startswith(self._folder):
            return
        self._inside = True
        try:
            self.count += 1
            self._at(self.count)
        finally:
            self._inside = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and not isinstance(path, int):
                self.happen(path)
        elif event in CHANGING:
            last = arguments[-1]  # a folder's descriptor, where the path is relative to it
            relative = event != "os.rename" and isinstance(last, int) and last > 2
            self.happen(arguments[0], relative=relative and not _text(arguments[0]).startswith("/"))

    def _wrap_fsync(self) -> None:
        real = os.fsync

        def fsync(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            self.happen(os.readlink(f"/proc/self/fd/{number}"))
            real(handle)

        os.fsync = fsync

    def _wrap(self, module: Any, name: str, place: int) -> None:
        """Count before a file is written, and again when a part of it is."""
        real = getattr(module, name)

        def write(*arguments: Any, **named: Any) -> Any:
            path = arguments[place] if len(arguments) > place else named.get("filename")
            if not isinstance(path, str | os.PathLike):
                return real(*arguments, **named)
            self.happen(path)
            result = real(*arguments, **named)
            content = Path(path).read_bytes()
            with Path(path).open("r+b") as stream:  # an operation of its own: nothing is there yet
                stream.truncate(len(content) // 2)
            self.happen(path)
            Path(path).write_bytes(content)
            return result

        setattr(module, name, write)


def _text(path: Any) -> str:
    try:
        return os.path.abspath(os.fsdecode(path))
    except TypeError:
        return ""
