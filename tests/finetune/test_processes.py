"""Two processes against one with the whole batch: ranks, losses, resumes, and one that dies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from drlora_torch.finetune import worker
from drlora_torch.integrations.trainer import last_checkpoint
from tests.torch import launches

pytestmark = launches.MARKS

STEPS = 30
RUN = ["finetune", "--steps", str(STEPS), "--save-every", "10", "--timetable", "late"]
SHARED = [*RUN, "--batch-size", "8", "--processes", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
COMMAND = [str(Path(sys.executable).with_name("drlora"))]
ROOT = Path(__file__).parents[2]  # for modules of the tests
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


def drlora(folder: Path, *arguments: str, code: int = 0, start: list[str] = COMMAND) -> str:
    """Run the command in a folder; what it printed, or the errors if it is to fail."""
    done = subprocess.run(
        [*start, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())[0]
    return found


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("runs")
    drlora(folder, *RUN, "--batch-size", "16", "--output", "one")
    return folder / "one"


def same_run(run: Path, one: Path) -> None:
    """The same decisions and losses, but for rounding."""
    ours, theirs = result(run), result(one)
    assert ours["ranks"] == theirs["ranks"]
    assert len({rank for ranks in ours["ranks"].values() for rank in ranks}) > 1
    assert ours["skipped_steps"] == 0
    assert ours["loss_after"] == pytest.approx(theirs["loss_after"], abs=2e-3)  # mean over batches
    assert losses(run) == pytest.approx(losses(one), abs=1e-5)
    assert set(losses(run)) == set(range(1, STEPS + 1))


def test_two_processes_train_as_one_and_go_on(one: Path, tmp_path: Path) -> None:
    said = drlora(tmp_path, *SHARED, "--output", "two")
    assert said.count("held-out loss after") == 1
    two = result(tmp_path / "two")
    same_run(tmp_path / "two", one)

    (tmp_path / "two" / "result.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / f"checkpoint-{STEPS}")
    assert (tmp_path / "two" / "checkpoints" / "checkpoint-20").is_dir()
    command = [*TORCHRUN, *COMMAND]
    drlora(tmp_path, "finetune", "--resume", "two", start=command)
    resumed = result(tmp_path / "two")
    assert resumed["ranks"] == two["ranks"]
    assert resumed["loss_after"] == two["loss_after"]


@pytest.mark.exhaustive
def test_when_one_process_is_killed_all_end_and_one_can_go_on(one: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    with (tmp_path / "errors").open("w+") as errors:
        started = subprocess.Popen(
            [*COMMAND, *SHARED, "--output", "two"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with started:
            assert started.stdout is not None
            assert any(f"step 12/{STEPS}" in line for line in started.stdout)
            children = psutil.Process(started.pid).children()
            processes = [child for child in children if worker.__name__ in child.cmdline()]
            assert len(processes) == 2
            (second,) = (each for each in processes if each.environ()["RANK"] == "1")
            second.kill()
            killed = time.monotonic()
            assert started.wait(timeout=60) == 128 + 9
            assert time.monotonic() - killed < 60
        assert not any(each.is_running() for each in processes)
        errors.seek(0)
        (said,) = (line for line in errors if line.startswith("drlora: "))
    assert "process 2 of 2 was killed by signal 9 (SIGKILL)" in said
    assert "drlora finetune --resume two --processes 2" in said
    assert not (run / "result.json").exists()
    assert last_checkpoint(run / "checkpoints") == str(run / "checkpoints" / "checkpoint-10")

    drlora(tmp_path, "finetune", "--resume", "two")
    same_run(run, one)


@pytest.mark.exhaustive
def test_a_refusal_by_the_processes_is_said_once(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    arguments = [str(missing), "rows.jsonl", "--output", "run", "--processes", "2"]
    said = drlora(tmp_path, "finetune", *arguments, code=2)
    assert said.count("has no config.json") == 1
    assert said.count("drlora: ") == 1
    assert "Traceback" not in said
    assert "exitcode" not in said  # of torchrun's own report
    assert not (tmp_path / "run").exists()
