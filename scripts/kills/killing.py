"""The campaign of kills: each piece of work is killed, gone on with, and compared."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from drlora_core import atomic
from scripts.kills.children import Child, Ended, Kill, run
from scripts.kills.jobs import Job
from scripts.kills.results import Outcome, differences, digests, leftovers

MOST_KILLS = 3  # of one piece of work, before it may end


class Reference(NamedTuple):
    """A piece of work in peace."""

    outcome: Outcome
    files: dict[str, set[str]]
    """Digests that each whole file may have: of the old one, and of the new one."""
    states: list[Outcome]
    """All whole files before and after the work."""
    operations: int
    seconds: float
    size: int
    """Bytes of all files in the end."""
    largest: int
    """Bytes of the largest file."""


class Tally(NamedTuple):
    """What has become of one case."""

    kills: int
    problems: list[str]


class Campaign:
    """Kills pieces of work in a folder, and remembers how each ends in peace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[str, Reference] = {}

    def reference(self, job: Job) -> Reference:
        """Do some work in peace, once."""
        if job.name not in self._references:
            place = self.start(job, "reference")
            old = digests(place, *job.whole)
            ended = do(job, place)
            if ended.code:
                raise RuntimeError(f"{job.name} fails in peace: {ended.said}")
            new = digests(place, *job.whole)
            files = {name: {d for d in (old.get(name), new.get(name)) if d} for name in old | new}
            found = job.outcome(place)
            left = leftovers(place)
            if left:
                raise RuntimeError(f"{job.name} leaves {left} in peace")
            sizes = [file.stat().st_size for file in place.rglob("*") if file.is_file()]
            self._references[job.name] = Reference(
                found, files, [old, new], ended.operations, ended.seconds, sum(sizes), max(sizes)
            )
            shutil.rmtree(place)
        return self._references[job.name]

    def start(self, job: Job, name: str) -> Path:
        """Make the folder of a piece of work, with what is there before it."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        before = run(functools.partial(job.prepare, place), place)
        if before.code:
            raise RuntimeError(f"{job.name} cannot be prepared: {before.said}")
        return place

    def case(self, job: Job, draw: random.Random) -> Tally:
        """Kill some work once or more often, let it end, and compare."""
        reference = self.reference(job)
        place, kills, problems = self.start(job, "killed"), 0, []
        for _ in range(draw.randint(1, MOST_KILLS)):
            ended = do(job, place, choose(reference, draw))
            if not ended.killed:
                problems += [] if ended.code == 0 else [f"exit {ended.code}: {last_words(ended)}"]
                break
            kills += 1
            problems += broken(job, reference, place)
        ended = do(job, place)
        if ended.code:
            problems.append(f"does not go on, exit {ended.code}: {last_words(ended)}")
        else:
            problems += compare(job, reference, place)
        if not problems:
            shutil.rmtree(place)
        return Tally(kills, problems)


def compare(job: Job, reference: Reference, place: Path) -> list[str]:
    """Name what differs from the work in peace, and what it has left over."""
    try:
        found = job.outcome(place)
    except Exception as error:
        return [f"the outcome cannot be read: {error}"]
    left = leftovers(place)
    return differences(reference.outcome, found) + ([f"left over: {left}"] if left else [])


def broken(job: Job, reference: Reference, place: Path) -> list[str]:
    """Name files that are neither the old nor the new ones, right after a kill."""
    found = digests(place, *job.whole)
    problems = [
        f"{name} is neither old nor new"
        for name, value in found.items()
        if value not in reference.files.get(name, ())
    ]
    if job.together and found and found not in reference.states and not problems:
        names = {Path(name).name for name in found}
        if not is_refused(names):
            problems.append(f"{job.together} is a mixture of old and new: {sorted(names)}")
    return problems


def is_refused(names: set[str]) -> bool:
    """Without its configuration, no model or adapter loads from a folder."""
    return names.isdisjoint(atomic.CONFIGURATIONS)


def choose(reference: Reference, draw: random.Random) -> Kill:
    """A random moment, or one of its operations on files."""
    if draw.random() < 0.4:
        return Kill(draw.uniform(0.0, 1.1 * reference.seconds))
    operation = draw.randint(1, max(reference.operations, 1))
    return Kill(draw.choice([0.0, 0.0, 1e-4, 1e-3, 1e-2]), operation)


def do(
    job: Job,
    place: Path,
    kill: Kill | None = None,
    *,
    number: int = signal.SIGKILL,
    at: Callable[[int], None] | None = None,
    before: Callable[[], object] | None = None,
) -> Ended:
    """Do some work, or go on with it, in as many processes as it has.

    Args:
        job: the work.
        place: its folder.
        kill: when the first process gets a signal.
        number: of the signal.
        at: called before each operation of the first process.
        before: called in each process before the work.
    """
    work = functools.partial(job.work, place)
    if not job.is_command:
        work = functools.partial(_say_errors, work)
    at_once = kill is not None and kill.operation is not None and kill.seconds == 0.0

    def die(count: int) -> None:
        if kill is not None and count == kill.operation:
            os.kill(os.getpid(), number)

    announce = None if kill is None or at_once else kill.operation
    children = [
        Child(
            work, place, environment=environment, announce=announce if first else None,
            at=(die if at_once else at) if first else None, before=before,
        )
        for first, environment in _environments(job.processes)
    ]  # fmt: skip
    return _end(children, None if at_once else kill, number)


def _say_errors(work: Callable[[], object]) -> None:
    """Say errors that a user of the library is meant to see as the command line does."""
    from drlora_core.errors import DRLoRAError

    try:
        work()
    except KeyboardInterrupt:
        sys.exit("drlora: interrupted")
    except (DRLoRAError, OSError) as error:
        sys.exit(f"drlora: {error}")


def _environments(processes: int) -> list[tuple[bool, dict[str, str]]]:
    """What a launcher tells each process, and whether it is the first."""
    if processes == 1:
        return [(True, {})]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [(str(rank), rank == 0) for rank in range(processes)]
    return [(first, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank, first in ranks]


def _end(children: list[Child], kill: Kill | None, number: int) -> Ended:
    """Wait for all; when the first has been killed, the others are, as a launcher does."""
    first, *others = children
    ended = first.end(kill, number)
    for other in others:
        if ended.code:
            other.send(signal.SIGKILL)
        its = other.end()
        if its.code and not ended.code:
            ended = its
    return ended


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def last_words(ended: Ended) -> str:
    """The end of what a child said."""
    return " | ".join(ended.said.strip().splitlines()[-6:])
