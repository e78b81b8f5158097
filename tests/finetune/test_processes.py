"""Two processes under torchrun against one with the whole batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

STEPS = 30
RUN = ["finetune", "--steps", str(STEPS), "--save-every", "10"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]


def drlora(folder: Path, *arguments: str, processes: int = 1) -> str:
    """Run the command in a folder of its own; what it printed."""
    command = [str(Path(sys.executable).with_name("drlora")), *arguments]
    if processes > 1:
        command = [*TORCHRUN, *command]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())[0]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_as_one_and_go_on(tmp_path: Path) -> None:
    drlora(tmp_path, *RUN, "--batch-size", "16", "--output", "one")
    said = drlora(tmp_path, *RUN, "--batch-size", "8", "--output", "two", processes=2)
    assert said.count("held-out loss after") == 1
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert two["ranks"] == one["ranks"]
    assert two["skipped_steps"] == 0
    assert two["loss_after"] == pytest.approx(one["loss_after"], abs=2e-3)  # a mean over batches
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) > STEPS

    (tmp_path / "two" / "result.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoints" / f"checkpoint-{STEPS}")
    assert (tmp_path / "two" / "checkpoints" / "checkpoint-20").is_dir()
    drlora(tmp_path, "finetune", "--resume", "two", processes=2)
    resumed = result(tmp_path / "two")
    assert resumed["ranks"] == two["ranks"]
    assert resumed["loss_after"] == two["loss_after"]
