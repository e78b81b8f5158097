"""The examples that need no torch run unchanged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.core import recorded

EXAMPLE = Path(__file__).parents[1] / "examples" / "03_policy_offline.py"


def run(*arguments: str) -> str:
    """Run Python with warnings as errors; return what it printed."""
    command = [sys.executable, "-W", "error", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_offline_policy_is_compared_with_the_papers() -> None:
    printed = run(str(EXAMPLE))
    assert "greedy: mean rank 8.00" in printed
    assert "half_by_routing: mean rank 8.00" in printed
    assert "overlap: 0." in printed


def test_the_offline_policy_runs_on_a_recording(tmp_path: Path) -> None:
    recorded.record(tmp_path / "run")
    assert "greedy: mean rank 4.00" in run(str(EXAMPLE), str(tmp_path / "run"))


@pytest.mark.slow
def test_the_tests_of_the_example_pass() -> None:
    printed = run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(EXAMPLE))
    assert "2 passed" in printed
