"""Runs of which almost nothing was recorded can be drawn, checked and diagnosed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from drlora_core import AllocatorEngine, LayoutError, plots
from drlora_core.diagnostics import diagnose
from drlora_core.recording import Recording
from drlora_core.report import figures, verdicts
from drlora_core.report.rows import top_experts
from drlora_core.runs import as_run
from drlora_core.runs.run import Run
from tests.core import recorded


@pytest.fixture
def bare(tmp_path: Path) -> Run:
    """Return a run without statistics, which grew by its policy alone; a layer has one expert."""
    settings = recorded.config(use_routing=False, use_importance=False)
    engine = recorded.build(settings, {"first": 6, "single": 1})
    engine.record_to(tmp_path / "run")
    for _ in range(20):
        engine.observe_all(routing=None, importance=None)
        engine.step()
    engine.record_to(None)
    return as_run(Recording.open(tmp_path / "run"))


def test_what_was_not_recorded_is_not_drawn(bare: Run) -> None:
    with pytest.raises(LayoutError, match="no routing was recorded"):
        plots.rank_against_routing(bare)
    assert "routing" not in [card.key for card in figures.spread_cards(bare)]
    for layer in bare.layers:
        assert plots.trajectories(bare, layer).data
        assert plots.signals(bare, layer).data
    assert plots.rank_map(bare).data


def test_what_was_not_recorded_is_not_checked(bare: Run) -> None:
    result = diagnose(bare)
    assert any("no routing was recorded" in text for text in result.not_checked.values())
    assert verdicts.check(bare).good


def test_a_run_that_was_killed_before_its_first_steps_were_written_has_a_page(
    tmp_path: Path,
) -> None:
    engine = recorded.build(recorded.config())
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 3)
    engine.state_dict()  # which writes the steps
    (tmp_path / "killed").mkdir()
    shutil.copy(tmp_path / "run" / "recording.json", tmp_path / "killed")
    run = as_run(Recording.open(tmp_path / "killed"))
    engine.record_to(None)
    assert run.recording.steps == 0
    assert verdicts.check(run) == verdicts.Verdicts((), (), ())
    with pytest.raises(LayoutError, match="has no steps, so there is nothing to diagnose"):
        diagnose(run)
    for row in top_experts(run):
        assert list(row) == ["layer", "expert", "rank at the start", "rank at the end"]
        assert row["rank at the start"] == row["rank at the end"] == 2


def test_an_engine_without_layers_is_not_diagnosed() -> None:
    with pytest.raises(LayoutError, match="no layers"):
        diagnose(AllocatorEngine(recorded.config()))
