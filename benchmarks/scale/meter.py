"""Memory and time of the stages of a run, as the operating system counts them (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import re
import time
from collections.abc import Iterator
from pathlib import Path

PROCESS = Path("/proc/self")
M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str
    seconds: float
    before: int
    """Resident bytes when it began, as are the following at their time."""
    after: int
    peak: int


class Meter:
    """Records stages, one after the other."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        gc.collect()
        self.start = resident()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        _restart_peak()
        before, started = resident(), time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        gc.collect()
        self.stages.append(Stage(name, seconds, before, resident(), peak()))

    def peak(self, prefix: str = "") -> int:
        """Highest resident bytes of the stages with such a name."""
        return max(stage.peak for stage in self.stages if stage.name.startswith(prefix))


def return_large_blocks(mebibytes: int) -> bool:
    """Let malloc give a freed block of this size or more back at once; False if it cannot.

    glibc by default keeps blocks of up to 32 MiB for itself once one has been freed, and finds a
    hole that an aligned block has left too small for the next aligned one of the same size. So an
    unpacked expert after another, of 6 MiB each, leaves hundreds of MiB of holes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, mebibytes * 2**20))


def resident() -> int:
    """Bytes of this process in memory."""
    return _read(PROCESS / "status", "VmRSS")


def peak() -> int:
    """Highest of :func:`resident` since the peak was restarted, or ever."""
    return _read(PROCESS / "status", "VmHWM")


def available() -> int:
    """Bytes that the machine can still give."""
    return _read(Path("/proc/meminfo"), "MemAvailable")


def _read(path: Path, name: str) -> int:
    (kibibytes,) = re.findall(rf"^{name}:\s+(\d+) kB$", path.read_text(), flags=re.M)
    return 1024 * int(kibibytes)


def _restart_peak() -> None:
    """Let VmHWM begin anew; where that is not allowed, a peak is the highest until then."""
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
