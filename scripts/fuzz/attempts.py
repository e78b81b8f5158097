"""Read damaged files, and note what no user should see."""

from __future__ import annotations

import random
import resource
import shutil
import tempfile
import time
import traceback
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from scripts.fuzz import mutate, targets, torch_targets

ALL = targets.TARGETS | torch_targets.TARGETS
MOST_SECONDS, MOST_BYTES = 2.0, 200 * 2**20
KEPT = Path("fuzz-findings")


class Finding(Exception):
    """A reader failed in a way that no user should see: which, and how."""


def attempt(target: targets.Target, folder: Path) -> None:
    """Read a damaged folder: an error of ours, or a value, in bounded time and memory.

    Raises:
        Finding: anything else.
    """
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        target.read(folder)
    except targets.ACCEPTED:
        pass
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {last.filename}, line {last.lineno}"
        raise Finding(place, traceback.format_exc(limit=-4)) from error
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if (took := time.process_time() - start) > MOST_SECONDS:
        raise Finding("took too long", f"{took:.1f} s")
    if grown > MOST_BYTES:
        raise Finding("took too much memory", f"{grown / 2**20:.0f} MiB")


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
