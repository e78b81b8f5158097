"""The report that a run writes at its end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from drlora_core.runs import open_run
from drlora_torch.finetune import job
from drlora_torch.finetune.recipe import Recipe

pytest.importorskip("plotly")


def recipe(model: Path, data: Path) -> Recipe:
    return Recipe(
        model=str(model),
        data=str(data),
        steps=4,
        batch_size=4,
        max_length=16,
        r_init=1,
        r_target=2,
        r_max=4,
        dtype="float32",
        compare="uniform",
        eval_every=2,
    )


@pytest.mark.slow
def test_a_run_ends_with_its_report_and_an_error_there_costs_the_report_alone(
    moe_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    console = Console(record=True, file=io.StringIO(), width=200)
    ours, uniform = job.run(recipe(moe_folder, sums), output, console)
    assert str(output / "report.html") in console.export_text()
    page = (output / "report.html").read_text()
    before, after = f"{ours.loss_before:.3f}", f"{ours.loss_after:.3f}"
    assert (f"stayed at {after}" if before == after else f"{before} to {after}") in page
    assert f"uniform LoRA with the same budget reached {uniform.loss_after:.3f}" in page
    assert f"drlora finetune --config {output / 'run.yaml'}" in page
    assert "The held-out loss" in page or "the held-out loss" in page
    run = open_run(output)
    assert run.losses.steps.tolist() == [1, 2, 3, 4]
    assert run.losses.held_out_steps.tolist() == [0, 2, 4]
    assert run.losses.held_out[0] == pytest.approx(ours.loss_before)
    assert [name for name, _, _ in run.compared] == ["uniform"]
    assert run.last_step == 4
    assert "transformers" in run.recipe.made_by  # type: ignore[union-attr]

    def fail(path: Path) -> Path:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(job, "write_report", fail)
    second = tmp_path / "second"
    console = Console(record=True, file=io.StringIO(), width=200)
    results = job.run(recipe(moe_folder, sums), second, console)
    said = console.export_text()
    assert "no report was written: no room at all. To try again: drlora report " in said
    assert len(json.loads((second / "result.json").read_text())) == len(results) == 2
    assert not (second / "report.html").exists()
