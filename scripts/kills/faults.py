"""The campaign of faults: disks that fill up, fail or vanish, and signals that ask to stop."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from scripts.kills.children import Ended, Kill
from scripts.kills.jobs import Job
from scripts.kills.killing import Campaign, Reference, broken, compare, do, last_words

PARTS = (0.0, 0.5, 0.9)
"""How far the work is when a fault comes."""
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
DISK = 256 * 2**20
Nothing = Callable[[], object]


class Setting(NamedTuple):
    """What a fault may use."""

    job: Job
    reference: Reference
    place: Path
    disk: Path | None
    """A small disk that may be changed, in which ``place`` is; None without the right to mount."""
    part: float

    @property
    def operation(self) -> int:
        return 1 + int(self.part * self.reference.operations)


class Case(NamedTuple):
    """The end of work under a fault, and what lifts the fault."""

    ended: Ended
    lift: Nothing = lambda: None


def full(given: Setting) -> Case:
    """The disk has too little space."""
    if given.disk is None:
        return _refuse_from(given, errno.ENOSPC)
    used = shutil.disk_usage(given.disk).used
    size = used + int(given.part * given.reference.size)
    mount(given.disk, f"remount,size={max(size, 4096)}")
    return Case(do(given.job, given.place), lambda: mount(given.disk, f"remount,size={DISK}"))


def read_only(given: Setting) -> Case:
    """The disk cannot be written any more, from an operation on."""
    if given.disk is None:
        return _refuse_from(given, errno.EROFS)
    done = False

    def at(number: int) -> None:
        nonlocal done
        if number >= given.operation and not done:  # while a file is open, it is refused
            done = mount(given.disk, "remount,ro")

    return Case(do(given.job, given.place, at=at), lambda: mount(given.disk, "remount,rw"))


def _refuse_from(given: Setting, number: int) -> Case:
    def at(count: int) -> None:
        if count >= given.operation:
            raise OSError(number, os.strerror(number))

    return Case(do(given.job, given.place, at=at))


def limited(given: Setting) -> Case:
    """No file may be larger than the limit of the process; writing more is an error."""
    return Case(do(given.job, given.place, before=lambda: _limit(given)))


def limited_by_signal(given: Setting) -> Case:
    """The same, but the process ends by SIGXFSZ, which Python ignores."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        _limit(given)

    return Case(do(given.job, given.place, before=before))


def _limit(given: Setting) -> None:
    most = max(2048, int(given.part * given.reference.largest))  # room for what it says
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def deleted(given: Setting) -> Case:
    """Somebody deletes all that is being written, and what was there before."""
    done = False

    def at(number: int) -> None:
        nonlocal done
        there = list(given.place.iterdir())
        if number >= given.operation and not done and there:
            for folder in there:
                shutil.rmtree(folder, ignore_errors=True)
            done = True

    return Case(do(given.job, given.place, at=at))


def _signal(name: str) -> Callable[[Setting], Case]:
    def send(given: Setting) -> Case:
        kill = Kill(1e-3, given.operation)
        return Case(do(given.job, given.place, kill, number=signal.Signals[name]))

    return send


FAULTS: dict[str, Callable[[Setting], Case]] = {
    "disk full": full, "read-only": read_only, "RLIMIT_FSIZE": limited,
    "SIGXFSZ": limited_by_signal, "folder deleted": deleted,
    **{name: _signal(name) for name in SIGNALS},
}  # fmt: skip


def case(campaign: Campaign, disk: Path | None, job: Job, fault: str, part: float) -> list[str]:
    """Do some work under a fault, then go on without it; name what is wrong."""
    reference = campaign.reference(job)
    place = campaign.start(job, "fault")
    ended, lift = FAULTS[fault](Setting(job, reference, place, disk, part))
    problems = _judge_end(job, fault, ended)
    if fault != "folder deleted":
        problems += broken(job, reference, place)
    lift()
    if ended.code == 0 and fault not in ("folder deleted", "read-only"):
        return problems + [f"ends well, but {each}" for each in compare(job, reference, place)]
    again = do(job, place)
    if again.code:
        return [*problems, f"does not go on, exit {again.code}: {last_words(again)}"]
    return problems + compare(job, reference, place)


def _judge_end(job: Job, fault: str, ended: Ended) -> list[str]:
    """Anything but success, one sentence and a signal that no library can catch is wrong."""
    if ended.code == 0:
        return []
    if fault == "SIGXFSZ" and ended.code == -signal.SIGXFSZ:
        return []
    if fault in SIGNALS and not job.is_command and ended.code == -signal.Signals[fault]:
        return []
    if ended.code < 0:
        return [f"ended by signal {-ended.code}: {last_words(ended)}"]
    sentences = [line for line in ended.said.splitlines() if line.startswith("drlora: ")]
    for word in ("Traceback", "internal error", "Exception ignored"):
        if word in ended.said:
            return [f"{word}: {last_words(ended)}"]
    return [] if len(sentences) == 1 else [f"{len(sentences)} sentences: {last_words(ended)}"]


def mount(disk: Path | None, options: str) -> bool:
    """Mount a small disk in memory, or change it; False if that is refused."""
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Yield the folder of a disk in memory; None without the right to mount one."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0 or not mount(folder, f"size={DISK}"):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
