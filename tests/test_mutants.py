"""The list of mutants that survive is of today's code, and a weak test lets more survive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tomllib", reason="scripts need Python 3.11")

from scripts.mutants.listed import LISTED, read_listed

ROOT = Path(__file__).resolve().parent.parent


def test_listed_mutants_change_lines_of_today() -> None:
    for change in read_listed():
        module, _, function = change.function.rpartition(".")
        while not (path := ROOT / f"{module.replace('.', '/')}.py").exists():
            module, _, function = module.rpartition(".")  # a method
        code = " ".join(path.read_text().split())
        assert f"{function.rpartition('.')[2]}" in code
        assert " ".join(change.was.split()) in code, change
        assert change.was != change.becomes


def test_a_list_without_reasons_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(LISTED.read_text().replace("reason = ", "because = ", 1))
    with pytest.raises(KeyError, match="reason"):
        read_listed(path)


@pytest.mark.slow
def test_a_weak_test_lets_mutants_survive() -> None:
    """Only the bias is tested here, so mutants of ``update`` survive or are not reached at all."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.mutants", "drlora_core.ema"],
        cwd=ROOT,
        env=os.environ | {"PYTEST_ADDOPTS": "-k bias_of_each_count"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "not in the list: drlora_core.ema.update\n  - view *= decay" in done.stdout
    assert "drlora_core.ema.correct_bias" not in done.stdout
    assert "drlora_core.ema._bias" not in done.stdout
    assert "listed as equivalent" in done.stdout
