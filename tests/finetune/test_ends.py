"""A terminal that is closed, a folder that is deleted, and what a run that goes on has logged."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerState

from drlora_core import LayoutError
from drlora_torch.errors import RunError
from drlora_torch.finetune import folder, job
from drlora_torch.finetune.watch import stopping
from drlora_torch.finetune.watch.meter import Meter
from drlora_torch.finetune.watch.metrics_file import MetricsFile
from tests.finetune.test_finetune import options_for

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
QUIET = Console(quiet=True)


@pytest.mark.usefixtures("default_signals")
def test_a_run_whose_terminal_is_closed_stops_and_writes_nothing_there(tmp_path: Path) -> None:
    stop = stopping.StopOnSignal(1, torch.device("cpu"))
    with stop.listening(), (tmp_path / "terminal").open("w") as terminal:
        stop._terminals = [terminal.fileno()]
        os.kill(os.getpid(), signal.SIGHUP)
        print("lost", file=terminal, flush=True)
    assert (tmp_path / "terminal").read_text() == ""
    with pytest.raises(stopping.Stopped, match="stopped by SIGHUP") as stopped:
        stop.check("command")
    assert stopped.value.exit_code == 129


def test_under_nohup_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = stopping.StopOnSignal(1, torch.device("cpu"))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
        stop.check("command")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_remains_of_a_deleted_run_are_removed_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / folder.CHECKPOINTS / "checkpoint-2").mkdir(parents=True)
    (run / folder.METRICS).touch()
    with pytest.raises(RunError, match=r"run' of this run was deleted while it trained"):
        stopping.StopWhenDeleted(lambda: folder.check_there(run)).on_step_end(None, None, None)
    for name in ("mine.txt", folder.RECIPE, folder.DATA):
        (run / name).touch()
        folder.remove_remains(run)
        assert (run / folder.METRICS).exists()
        (run / name).unlink()
    folder.remove_remains(run)
    folder.remove_remains(run)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_has_just_begun_is_left_alone(
    moe_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found that the folder is missing; one is faster to load its model."""
    recipe, run, create = options_for(moe_folder, sums, steps=2), tmp_path / "run", folder.create

    def late(path: Path, given: Any) -> None:
        create(path, given)
        (path / "theirs").touch()
        create(path, given)

    monkeypatch.setattr(folder, "create", late)
    with pytest.raises(RunError, match="exists; use another --output"):
        job.run(recipe, run, QUIET)
    assert sorted(entry.name for entry in run.iterdir()) == [folder.RECIPE, "theirs"]


def test_a_run_whose_recipe_is_gone_is_not_called_deleted(tmp_path: Path) -> None:
    (tmp_path / folder.DATA).touch()
    with pytest.raises(RunError, match=r"run.yaml' was moved or deleted while the run trained"):
        folder.check_there(tmp_path)


@pytest.mark.slow
def test_a_run_that_is_deleted_ends_and_can_start_again(
    moe_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(self: Meter, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            shutil.rmtree(tmp_path / "run")

    recipe = options_for(moe_folder, sums, steps=6, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "on_save", delete)
        patch.setattr(Meter, "on_step_begin", delete, raising=False)
        with pytest.raises((RunError, LayoutError, OSError), match=r"deleted|No such file"):
            job.run(recipe, tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()
    (result,) = job.run(recipe, tmp_path / "run", QUIET)
    assert result.total_rank == result.budget


@pytest.mark.parametrize("during", [0, 1])
@pytest.mark.parametrize("after", [0, 1])
def test_the_last_evaluation_is_there_once(during: int, after: int, tmp_path: Path) -> None:
    """Also where a run was killed before its end, or when its last step was evaluated too."""
    rows = [{"eval_loss": 3.0, "step": 0}, {"loss": 2.0, "step": 6}]
    rows += [{"eval_loss": 1.0, "step": 6}] * during
    written = rows + [{"eval_loss": 1.0, "step": 6}] * after
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    state = TrainerState(global_step=6, log_history=rows[1:])
    MetricsFile(tmp_path / "m.jsonl", state).on_log(None, state, None, {"eval_loss": 1.0})
    found = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert found == [*rows, {"eval_loss": 1.0, "step": 6}]
