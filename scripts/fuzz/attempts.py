"""Read damaged files, and note what no user should see."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import Progress

from scripts.fuzz import data_targets, mutate, run_targets, targets, torch_targets

ALL = targets.TARGETS | torch_targets.TARGETS | data_targets.TARGETS | run_targets.TARGETS
MOST_BYTES = 200 * 2**20
STOPPED_AFTER = 30.0  # seconds: no reader ends a campaign by never ending
KEPT = Path("fuzz-findings")


class Finding(Exception):
    """A reader failed in a way that no user should see: which, and how."""


class _Hang(BaseException):
    """A reader was stopped; no reader catches it."""


def attempt(target: targets.Target, folder: Path) -> None:
    """Read a damaged folder: an error of ours, or a value, in bounded time and memory.

    Raises:
        Finding: anything else.
    """
    before, start = _forget_peak(), time.process_time()
    try:
        with _stopped_late(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder)
    except targets.ACCEPTED:
        pass
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust's panics are no Exception
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {last.filename}, line {last.lineno}"
        raise Finding(place, traceback.format_exc(limit=-4)) from error
    if (took := time.process_time() - start) > target.seconds:
        raise Finding("took too long", f"{took:.1f} s")
    if (grown := _memory("VmHWM") - before) > MOST_BYTES:
        raise Finding("took too much memory", f"{grown / 2**20:.0f} MiB")


def _memory(field: str) -> int:
    """Bytes of this process, as Linux counts them: ``VmRSS`` now, ``VmHWM`` at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def _forget_peak() -> int:
    """Let the most memory be counted from now on; return what is in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


@contextlib.contextmanager
def _stopped_late() -> Iterator[None]:
    """Raise in a reader that takes ``STOPPED_AFTER`` seconds of the processor."""

    def stop(*_: Any) -> NoReturn:
        raise _Hang(f"not finished after {STOPPED_AFTER:.0f} s")

    usual = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, STOPPED_AFTER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, usual)


def one_run(target: targets.Target, good: Path, place: Path, draw: random.Random) -> None:
    """Damage one file of a good folder, and read the folder."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(good, place)
    files = [file for part in target.files for file in sorted(place.glob(part))]
    file = draw.choice(files)
    file.write_bytes(mutate.mutator(file.name)(file.read_bytes(), draw))
    attempt(target, place)


def fuzz_plainly(name: str, runs: int, seed: int, console: Console) -> int:
    """Damage files at random; return the number of different findings."""
    target, found = ALL[name], set()
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        good, place = Path(folder, "good"), Path(folder, "damaged")
        good.mkdir()
        target.write(good)
        target.read(good)
        for number in progress.track(range(runs), description=name):
            try:
                one_run(target, good, place, random.Random(f"{seed} {name} {number}"))
            except Finding as finding:
                kind, text = finding.args
                if kind not in found:
                    found.add(kind)
                    shutil.copytree(place, KEPT / f"{name}-{number}", dirs_exist_ok=True)
                    console.print(f"{name}, run {number}: {kind}\n{text}", markup=False)
    return len(found)
