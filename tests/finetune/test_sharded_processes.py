"""Models that two processes hold together, fine-tuned and resumed, against one process."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from drlora_torch.embedded import TEST_FILE
from tests.finetune import sharded_runs
from tests.finetune.test_processes import COMMAND, drlora, losses, result
from tests.torch import launches

pytestmark = launches.MARKS

STEPS, STOP, ROWS = 12, 8, 64
RUN = ["finetune", "--steps", str(STEPS), "--save-every", "4", "--timetable", "late"]
RUN += ["--eval-data", "held-out.jsonl"]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
WORKER = [*TOGETHER, "--module", sharded_runs.__name__]
FSDP, TP = ["--fsdp-size", "2"], ["--tp-size", "2"]
EXPERTS = [*FSDP, "--ep-size", "2"]


def row(run: Path, name: str) -> dict[int, float]:
    """What the Trainer logged under a name, by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {each["step"]: each[name] for each in rows if name in each and "loss" in each}


def same_run(run: Path, one: Path, held_out: float = 1e-4) -> None:
    """The same decisions, steps and held-out losses, but for rounding."""
    ours, theirs = result(run), result(one)
    assert ours["ranks"] == theirs["ranks"]
    assert len({rank for ranks in ours["ranks"].values() for rank in ranks}) > 1
    assert ours["skipped_steps"] == 0
    for name in ("loss_before", "loss_after"):
        assert ours[name] == pytest.approx(theirs[name], abs=held_out)
    assert losses(run) == pytest.approx(losses(one), abs=1e-4)
    assert set(losses(run)) == set(range(1, STEPS + 1))
    assert row(run, "grad_norm") == pytest.approx(row(one, "grad_norm"), rel=1e-3)
    for name in ("learning_rate", "num_input_tokens_seen"):
        assert row(run, name) == row(one, name)


def stopped(run: Path, copy: Path) -> Path:
    """A copy of a run as it was at its second checkpoint."""
    shutil.copytree(run, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints" / f"checkpoint-{STEPS}")
    assert (copy / "checkpoints" / f"checkpoint-{STOP}").is_dir()
    return copy


@pytest.fixture(autouse=True)
def held_out(tmp_path: Path) -> None:
    rows = TEST_FILE.read_text().splitlines(keepends=True)[:ROWS]
    (tmp_path / "held-out.jsonl").write_text("".join(rows))


def test_a_sharded_model_trains_as_one_process(tmp_path: Path) -> None:
    run = [*RUN, "--batch-size", "8"]
    drlora(tmp_path, *run, "--accumulation", "2", "--output", "one")
    drlora(tmp_path, *run, "--processes", "2", *EXPERTS, "--output", "experts", start=COMMAND)
    same_run(tmp_path / "experts", tmp_path / "one")


@pytest.mark.exhaustive
def test_sharded_models_train_as_one_process_and_go_on_in_each_other(tmp_path: Path) -> None:
    one, first = tmp_path / "one", tmp_path / "experts"
    run = [*RUN, "--batch-size", "8"]
    drlora(tmp_path, *run, "--accumulation", "2", "--compare", "uniform", "--output", "one")
    arguments = [*run, "--compare", "uniform", "--processes", "2", *EXPERTS]
    said = drlora(tmp_path, *arguments, "--output", "experts", start=COMMAND)
    assert said.count("held-out loss after") == 1
    same_run(first, one)
    compared: list[Any] = [json.loads((run / "result.json").read_text())[1] for run in (first, one)]
    assert compared[0]["loss_after"] == pytest.approx(compared[1]["loss_after"], abs=1e-4)

    stopped(one, tmp_path / "one to tp")
    stopped(first, tmp_path / "experts to fsdp")
    commands = [
        [*RUN, "--batch-size", "4", "--accumulation", "2", "--output", "fsdp", *FSDP],
        [*run, "--accumulation", "2", "--output", "tp", *TP],
        ["finetune", "--resume", "experts to fsdp", *FSDP],
        ["finetune", "--resume", "one to tp", *TP],
    ]
    drlora(tmp_path, *map(json.dumps, commands), start=WORKER)
    for name in ("tp", "experts to fsdp", "one to tp"):
        same_run(tmp_path / name, one)
    same_run(tmp_path / "fsdp", one, held_out=5e-3)  # the mean over batches of four rows
    stopped(tmp_path / "tp", tmp_path / "tp to one")
    drlora(tmp_path, "finetune", "--resume", "tp to one")
    same_run(tmp_path / "tp to one", one)
