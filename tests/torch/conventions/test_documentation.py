"""The code of the page on adding a model runs as it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(script: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def ranks_of(printed: str) -> list[list[int]]:
    rows = re.findall(r"\[([\d, ]+)\]", printed)
    return [[int(rank) for rank in row.split(",")] for row in rows]


@pytest.mark.slow
def test_the_page_on_adding_a_model_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    script = tmp_path / "page.py"
    script.write_text(block, encoding="utf-8")
    assert ranks_of(run(script)) == [[2, 2, 2, 2], [2, 2, 2, 2]]
