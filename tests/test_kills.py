"""The campaigns of scripts/kills: few kills, few faults, and broken writers that they find."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from drlora_core import atomic
from scripts.kills import faults, jobs, killing
from scripts.kills.results import digests
from tests.marks import slow_but

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forks beside threads
ROOT = Path(__file__).parents[1]


def a_file(write: Callable[[Path, str], object]) -> jobs.Job:
    """Work that replaces a file."""
    return jobs.Job(
        "file", "file", lambda place: write(place / "out" / "a.txt", "new" * 100),
        lambda place: digests(place, "out/*"), is_command=False, whole=("out/*",),
        prepare=lambda place: atomic.write_text(place / "out" / "a.txt", "old" * 100),
    )  # fmt: skip


def in_place(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text[:100])
        stream.flush()
        os.fsync(stream.fileno())
        stream.write(text[100:])


def untidily(path: Path, text: str) -> None:
    part = path.parent / f"{atomic.PREFIX}{random.random()}.part"
    part.write_text(text)
    os.replace(part, path)


def in_a_traceback(path: Path, text: str) -> None:
    try:
        atomic.write_text(path, text)
    except OSError as error:
        raise AssertionError("unreachable") from error


def cases(folder: Path, job: jobs.Job, number: int) -> tuple[int, list[str]]:
    """Kill some work in a number of cases; return the kills and what was found."""
    campaign = killing.Campaign(folder)
    tallies = [campaign.case(job, random.Random(seed)) for seed in range(number)]
    problems = [problem for tally in tallies for problem in tally.problems]
    return sum(tally.kills for tally in tallies), problems


def test_killed_recordings_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    kills, problems = cases(tmp_path, jobs._record(), 3)
    assert kills >= 3
    assert problems == []


def test_an_atomic_writer_survives(tmp_path: Path) -> None:
    kills, problems = cases(tmp_path, a_file(atomic.write_text), 6)
    assert kills >= 3
    assert problems == []


@pytest.mark.slow
def test_a_writer_that_is_not_atomic_is_found(tmp_path: Path) -> None:
    _, problems = cases(tmp_path, a_file(in_place), 6)
    assert set(problems) == {"out/a.txt is neither old nor new"}


@pytest.mark.slow
def test_a_writer_that_leaves_files_is_found(tmp_path: Path) -> None:
    _, problems = cases(tmp_path, a_file(untidily), 6)
    assert problems
    assert all("left over: ['out/.drlora-" in problem for problem in problems)


@pytest.mark.parametrize("fault", slow_but(faults.FAULTS, ["disk full", "folder deleted"]))
def test_recordings_outlive_faults(fault: str, tmp_path: Path) -> None:
    campaign = killing.Campaign(tmp_path)
    assert faults.case(campaign, None, jobs._record(), fault, 0.5) == []


@pytest.mark.parametrize("fault", ["disk full", "read-only"])
def test_an_error_that_no_user_should_see_is_found(fault: str, tmp_path: Path) -> None:
    campaign = killing.Campaign(tmp_path)
    (problem,) = faults.case(campaign, None, a_file(in_a_traceback), fault, 0.0)
    assert problem.startswith("Traceback")


@pytest.mark.slow
def test_killed_trainings_go_on_as_if_nothing_had_happened() -> None:
    words = ["--kinds", "finetune", "--kills", "3", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.kills", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in done.stdout.splitlines() if "finetune" in line)
    kills, cases, equal, failures = (int(cell) for cell in row.split("│")[2:6])
    assert kills >= 3
    assert cases == equal > 0
    assert failures == 0
