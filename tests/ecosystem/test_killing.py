"""A run killed with SIGKILL at random points ends like an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ecosystem import killing

ROOT = Path(__file__).parents[2]


def killed(folder: Path, kills: int, seed: int, *optimizers: str) -> dict[str, Any]:
    arguments = [str(folder), str(kills), str(seed), *optimizers]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ecosystem.killing", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def check(results: dict[str, Any], kills: int) -> None:
    for name, result in results.items():
        assert result["same"], name
        assert len(result["places"]) == kills
        assert len(result["losses"]) == killing.BATCHES
        assert all(len(set(ranks)) > 1 for ranks in result["ranks"].values())  # growth happened


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_few_kills(tmp_path: Path) -> None:
    check(killed(tmp_path, 3, 0, *killing.OPTIMIZERS), 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(each, marks=[pytest.mark.exhaustive] if number else [])
        for number, each in enumerate(killing.OPTIMIZERS)
    ],
)
def test_twenty_kills(tmp_path: Path, optimizer: str) -> None:
    results = killed(tmp_path, 20, 1, optimizer)
    check(results, 20)
    assert results[optimizer]["unfinished"] > 0
    places = set(results[optimizer]["places"])
    assert {"micro-batch", "stepping"} & places
    assert {"saving", "adapter saved", "renaming"} & places
