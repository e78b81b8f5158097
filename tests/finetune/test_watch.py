"""What happens on the way: signals, divergence, metrics, early stopping, longer runs, formats."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState

import drlora_torch
from drlora_core.cli import main
from drlora_core.locks import LOCK, FolderLock
from drlora_core.recording import Recording
from drlora_torch.errors import RunError
from drlora_torch.finetune import folder, job
from drlora_torch.finetune.watch import stopping
from drlora_torch.finetune.watch.meter import Meter
from drlora_torch.finetune.watch.metrics_file import MetricsFile
from tests.finetune.test_finetune import losses, options_for

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore::DeprecationWarning",
    "ignore:.*is not finite:RuntimeWarning",
)
QUIET = Console(quiet=True)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / folder.METRICS).read_text().splitlines()]


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Have a signal come within a step."""

    def send(self: Meter, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step - 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Meter, "on_step_begin", send, raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_checkpoint_from_which_it_goes_on(
    number: int,
    code: int,
    moe_folder: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = options_for(moe_folder, sums, steps=5, save_every=5)
    (whole,) = job.run(recipe, tmp_path / "whole", QUIET)
    run = tmp_path / "stopped run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, 2, number)
        sentence = r"after step 2; go on with: drlora finetune --resume '.*stopped run'"
        with pytest.raises(stopping.Stopped, match=sentence) as stopped:
            job.run(recipe, run, QUIET)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before
    assert [row["step"] for row in rows_of(run) if "loss" in row] == [1, 2]  # live
    (resumed,) = job.run(folder.read(run), run, QUIET, resume=True)
    assert losses(run) == losses(tmp_path / "whole")
    assert resumed.ranks == whole.ranks
    assert resumed.loss_after == whole.loss_after
    assert Recording.open(run / "recording").steps == 5


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_obeyed(
    moe_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job.evaluate_first

    def interrupted(trainer: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer)

    recipe = options_for(moe_folder, sums, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(job, "evaluate_first", interrupted)
        with pytest.raises(stopping.Stopped, match="before the first step; go on with"):
            job.run(recipe, tmp_path / "run", QUIET)
    (result,) = job.run(folder.read(tmp_path / "run"), tmp_path / "run", QUIET, resume=True)
    assert result.total_rank == result.budget


@pytest.mark.usefixtures("default_signals")
def test_the_same_signal_again_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = stopping.StopOnSignal(1, torch.device("cpu"))
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes on what it has had itself
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(stopping, "IMPATIENT_AFTER", 0.0)
        time.sleep(0.01)
        with pytest.raises(SystemExit) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.code == 130
    with pytest.raises(stopping.Stopped, match="stopped by SIGINT before the first step"):
        stop.check("command")


@pytest.mark.slow
def test_a_diverged_run_stops_and_keeps_the_last_checkpoint(
    moe_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(self: Meter, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            for parameter in kwargs["model"].parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(math.nan)

    recipe = options_for(moe_folder, sums, steps=12, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "on_step_begin", poison, raising=False)
        with pytest.raises(
            stopping.Diverged, match=r"loss is nan at step 5: .* diverged"
        ) as raised:
            job.run(recipe, tmp_path / "run", QUIET)
    assert raised.value.exit_code == 1
    assert not (tmp_path / "run" / folder.ADAPTER).exists()
    (result,) = job.run(folder.read(tmp_path / "run"), tmp_path / "run", QUIET, resume=True)
    assert losses(tmp_path / "run").keys() == set(range(1, 13))
    assert math.isfinite(result.loss_after)


def test_a_run_that_diverges_in_its_last_step_saves_nothing_and_exits_with_1(
    moe_folder: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--steps 3 --learning-rate 1e38 --max-grad-norm 0 --r-init 1 --r-target 2 --r-max 4"
    words = ["finetune", str(moe_folder), str(sums), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        main([*words, *options.split()])
    assert stopped.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("drlora: ")]
    assert len(said) == 1
    assert "diverged" in said[0]
    assert "the last checkpoint is kept" in said[0]
    assert not (tmp_path / "run" / folder.ADAPTER).exists()
    assert not (tmp_path / "run" / folder.RESULT).exists()


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps(
    moe_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another working directory, with a constant rate it equals a run of that length."""
    given = {"lr_scheduler": "constant", "growth_end": 2, "warmup_steps": 0, "growth_interval": 1}
    monkeypatch.chdir(sums.parent)
    recipe = options_for(moe_folder, Path(sums.name), steps=6, save_every=3, **given)
    (whole,) = job.run(recipe, tmp_path / "whole", QUIET)
    run = tmp_path / "run"
    job.run(recipe.model_copy(update={"steps": 3}), run, QUIET)
    monkeypatch.chdir(tmp_path)
    longer = folder.read(run).model_copy(update={"steps": 6})
    (result,) = job.run(longer, run, QUIET, resume=True)
    assert losses(run) == losses(tmp_path / "whole")
    assert (result.loss_after, result.ranks) == (whole.loss_after, whole.ranks)
    assert folder.read(run).steps == 6


@pytest.mark.slow
def test_the_recipe_of_a_run_repeats_it(moe_folder: Path, sums: Path, tmp_path: Path) -> None:
    from drlora_torch.finetune.recipe import combine

    given = {"epochs": 0.5, "steps": None, "eval_every": 2, "packing": True, "max_length": 40}
    recipe = options_for(moe_folder, sums, **given)
    (first,) = job.run(recipe, tmp_path / "first", QUIET)
    again = combine({}, tmp_path / "first" / folder.RECIPE)
    (second,) = job.run(again, tmp_path / "second", QUIET)
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert second.loss_after == first.loss_after
    evaluated = [row["step"] for row in rows_of(tmp_path / "first") if "eval_loss" in row]
    assert evaluated[:2] == [0, 2]


@pytest.mark.slow
def test_packing_changes_nothing_but_the_shape_of_batches(moe_folder: Path, tmp_path: Path) -> None:
    """One step on all rows has the same loss, and as many tokens."""
    data = tmp_path / "four.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": "a" * n, "completion": "b"}) + "\n" for n in (2, 3, 4, 5))
    )
    found = {}
    for packing, size in ((True, 1), (False, 4)):
        recipe = options_for(
            moe_folder, data, eval_data=str(data), steps=1, batch_size=size, packing=packing,
            max_length=22, dtype="float32", growth_end=1, warmup_steps=0,
        )  # fmt: skip
        run = tmp_path / str(packing)
        job.run(recipe, run, QUIET)
        adapter_rows = [row for row in rows_of(run) if "loss" in row]
        record = Recording.open(run / "recording")
        found[packing] = (adapter_rows[0], record.routing)
    name = "num_input_tokens_seen"
    assert found[True][0][name] == found[False][0][name] == 22
    assert found[True][0]["loss"] == pytest.approx(found[False][0]["loss"], rel=1e-5)
    np.testing.assert_allclose(found[True][1], found[False][1], rtol=1e-5)


@pytest.mark.slow
def test_a_stream_trains_and_goes_on_where_it_stopped(
    moe_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"steps": 5, "save_every": 5, "streaming": True, "eval_data": str(sums)}
    recipe = options_for(moe_folder, sums, **given)
    job.run(recipe, tmp_path / "whole", QUIET)
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        with pytest.raises(stopping.Stopped):
            job.run(recipe, tmp_path / "run", QUIET)
    job.run(folder.read(tmp_path / "run"), tmp_path / "run", QUIET, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_preferences_are_learned_and_the_reference_is_the_base(
    moe_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}=", "chosen": "y", "rejected": "n"} for n in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result,) = job.run(options_for(moe_folder, data, method="dpo"), tmp_path / "run", QUIET)
    assert result.loss_before == pytest.approx(math.log(2), abs=1e-6)  # policy = reference
    assert result.loss_after < 0.65
    assert result.total_rank == result.budget


@pytest.mark.slow
def test_early_stopping_keeps_the_best(moe_folder: Path, sums: Path, tmp_path: Path) -> None:
    """A rate at which it soon gets worse; the best evaluation is what is saved."""
    given = {"steps": 40, "eval_every": 2, "patience": 2, "learning_rate": 0.5, "save_every": None}
    (result,) = job.run(options_for(moe_folder, sums, **given), tmp_path / "run", QUIET)
    evaluated = {r["step"]: r["eval_loss"] for r in rows_of(tmp_path / "run") if "eval_loss" in r}
    steps = [step for step in evaluated if step > 0]
    assert len(losses(tmp_path / "run")) < 40
    del evaluated[0]
    best = min(evaluated, key=lambda step: evaluated[step])
    assert result.loss_after == pytest.approx(evaluated[best], rel=1e-6)
    adapter = drlora_torch.load(
        job.load_base(folder.read(tmp_path / "run").options), tmp_path / "run"
    )
    assert adapter.engine.step_count == best < max(steps)


@pytest.mark.slow
def test_a_run_starts_from_an_adapter(moe_folder: Path, sums: Path, tmp_path: Path) -> None:
    recipe = options_for(moe_folder, sums, steps=6)
    (first,) = job.run(recipe, tmp_path / "first", QUIET)
    given = {"adapter": str(tmp_path / "first"), "steps": 4}
    (second,) = job.run(recipe.model_copy(update=given), tmp_path / "second", QUIET)
    assert second.loss_before == first.loss_after
    assert second.ranks == first.ranks
    assert second.loss_after < first.loss_after
    other = recipe.model_copy(update={**given, "r_target": 3})
    with pytest.raises(RunError, match="--r-target 3: the adapter to start from has 2"):
        job.run(other, tmp_path / "third", QUIET)
    with pytest.raises(RunError, match="no adapter of drlora"):
        job.run(recipe.model_copy(update={"adapter": str(sums.parent)}), tmp_path / "third", QUIET)
    assert not (tmp_path / "third").exists()


def test_metrics_are_appended_as_they_come(tmp_path: Path) -> None:
    state = TrainerState()
    old = ['{"eval_loss": 9.0, "step": 0}', '{"loss": 3.0, "step": 1, "train_runtime": 1}']
    cut = ['{"loss": 8.0, "step": 2}', '{"train_loss": 4.0, "step": 1}', '{"los']
    (tmp_path / "m.jsonl").write_text("\n".join(old + cut))
    file = MetricsFile(tmp_path / "m.jsonl", TrainerState(global_step=1))
    file.on_log(None, state, None, {"eval_loss": 1.0})  # measured before the run goes on
    state.global_step = 2
    file.on_log(None, state, None, {"loss": 2.0, "grad_norm": math.inf})
    file.on_log(None, state, None, {"train_loss": 0.5})  # of the steps since it went on
    found = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert found == [*map(json.loads, old), {"loss": 2.0, "grad_norm": None, "step": 2}]
    MetricsFile(tmp_path / "m.jsonl", None)
    assert (tmp_path / "m.jsonl").read_text() == ""


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
def test_losses_that_are_not_finite_are_noticed(name: str) -> None:
    watch = stopping.StopWhenDiverged()
    for good in ({name: 1.0}, {"other": math.nan}, {}, None):
        watch.on_log(None, TrainerState(), TrainerControl(), good)
    for bad in (math.nan, math.inf):
        with pytest.raises(stopping.Diverged, match=f"{name} is {bad} at step 0"):
            watch.on_log(None, TrainerState(), TrainerControl(), {name: bad})


@pytest.mark.slow
def test_a_resume_after_early_stopping_keeps_the_best(
    moe_folder: Path, sums: Path, tmp_path: Path
) -> None:
    """Also where only the result and the adapter were not written yet."""
    given = {"steps": 40, "eval_every": 2, "patience": 2, "learning_rate": 0.5, "save_every": None}
    run = tmp_path / "run"
    (first,) = job.run(options_for(moe_folder, sums, **given), run, QUIET)
    steps = losses(run).keys()
    (run / folder.RESULT).unlink()
    shutil.rmtree(run / folder.ADAPTER)
    (again,) = job.run(folder.read(run), run, QUIET, resume=True)
    assert losses(run).keys() == steps
    assert (again.loss_after, again.ranks) == (first.loss_after, first.ranks)


def test_two_processes_do_not_train_into_one_folder(
    moe_folder: Path, sums: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job.run(options_for(moe_folder, sums, steps=2, save_every=2), run, QUIET)
    assert not (run / LOCK).exists()
    before = (run / folder.RECIPE).read_bytes()
    longer = folder.read(run).model_copy(update={"steps": 4})
    held = FolderLock(run)
    with pytest.raises(RunError, match="another process trains into"):
        job.run(longer, run, QUIET, resume=True)
    held.release()
    assert (run / folder.RECIPE).read_bytes() == before
    assert (run / folder.RESULT).exists()


def test_a_failure_before_the_training_leaves_no_folder(
    moe_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("no")

    monkeypatch.setattr(job, "build_trainer", fail)
    with pytest.raises(RunError, match="no"):
        job.run(options_for(moe_folder, sums), tmp_path / "run", QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    moe_folder: Path, sums: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job.run(options_for(moe_folder, sums, steps=2, save_every=2), run, QUIET)
    before = {name: (run / name).read_bytes() for name in (folder.RECIPE, folder.RESULT)}
    other = folder.read(run).model_copy(update={"steps": 4, "dropout": 0.5})
    with pytest.raises(drlora_torch.CheckpointError, match="other options"):
        job.run(other, run, QUIET, resume=True)
    assert before == {name: (run / name).read_bytes() for name in before}
    (run / "checkpoints" / "checkpoint-2" / "optimizer.pt").unlink()
    longer = folder.read(run).model_copy(update={"steps": 4})
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    passed = pytest.warns(RuntimeWarning, match="over for an older one: optimizer.pt is missing")
    with passed, pytest.raises(drlora_torch.CheckpointError, match="every checkpoint in"):
        job.run(longer, run, QUIET, resume=True)
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_speed_and_seconds_are_those_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    meter, state = Meter(), TrainerState()
    meter.on_train_begin(None, state, None)
    for _ in range(2):
        clock[0] += 3.0
        state.num_input_tokens_seen += 60
        meter.on_step_end(None, state, None)
        clock[0] += 100.0
        meter.on_evaluate(None, state, None)
        clock[0] += 100.0
        meter.on_save(None, state, None)
    assert (meter.seconds, meter.tokens, meter.tokens_per_second) == (6.0, 120, 20.0)
