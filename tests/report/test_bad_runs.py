"""Files of a run's folder that are damaged, or that someone else has written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import plots
from drlora_core.report import write_report
from drlora_core.runs import Losses, open_run
from drlora_core.runs.metrics import read_losses
from drlora_core.runs.recipe import read_recipe
from drlora_core.runs.result import read_outcomes
from tests.core import recorded
from tests.core.commands import call
from tests.report.runs import write_run

pytest.importorskip("plotly")
HUGE = 10**400


@pytest.mark.parametrize("step", [1e30, HUGE, 10**13, -1, True, "3", None, 1.5, float("nan"), [1]])
def test_a_row_without_a_step_is_left_out(step: Any) -> None:
    assert Losses.from_rows([{"step": step, "loss": 1.0}]).last_step == 0


@pytest.mark.parametrize("loss", [HUGE, float("nan"), float("inf"), True, "1", None, {}])
def test_a_loss_that_is_no_number_is_left_out(loss: Any) -> None:
    losses = Losses.from_rows([{"step": 1, "loss": loss}, {"step": 2, "loss": 2}])
    assert losses.steps.tolist() == [2]


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    lines = ["[1]", "{", "[" * 100_000, '{"step": 1, "loss": 1e999}', '{"step": 2, "loss": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_losses(tmp_path / "metrics.jsonl").training.tolist() == [3.0]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_result_that_is_not_finite_is_none(number: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(f'[{{"method": "greedy", "loss_before": 1.0, "loss_after": {number}}}]')
    assert read_outcomes(path) == ()


@pytest.mark.parametrize("steps", ["yes", "1" + "0" * 30, "-4", "1e3", "[]", ".nan"])
def test_planned_steps_are_a_whole_number(steps: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"steps: {steps}\n")
    recipe = read_recipe(tmp_path / "run.yaml")
    assert recipe is not None
    assert recipe.steps == 0


def test_a_loss_beyond_32_bits_is_drawn_without_a_warning(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    row = json.dumps({"step": 21, "loss": 1e300})
    (path / "metrics.jsonl").write_text(row + "\n")
    drawn = plots.loss(open_run(path)).data[0]
    assert np.isinf(drawn.y).all()


def test_a_folder_whose_name_is_no_text_has_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    path = tmp_path / os.fsdecode(b"run-\xff")
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system wants UTF-8")
    recorded.record(path / "recording")
    page = write_report(open_run(path))
    assert "<bdi>run-?</bdi>" in page.read_text(encoding="utf-8")
    assert call(capsys, "report", path).code == 0
