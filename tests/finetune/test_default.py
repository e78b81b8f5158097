"""``drlora finetune`` without arguments: the shipped model and task, as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drlora_core.recording import Recording
from drlora_core.replay import replay
from drlora_torch.embedded import MODEL_DIR, TEST_FILE, TRAIN_FILE


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_shipped_is_small_and_held_out_rows_are_not_trained_on() -> None:
    size = sum(path.stat().st_size for path in MODEL_DIR.rglob("*") if path.is_file())
    assert size <= 12 * 2**20
    assert not {row["prompt"] for row in rows(TRAIN_FILE)} & {r["prompt"] for r in rows(TEST_FILE)}


@pytest.mark.slow
def test_the_default_run_learns_and_grows_where_it_is_needed(tmp_path: Path) -> None:
    command = shutil.which("drlora", path=str(Path(sys.executable).parent))
    assert command is not None
    ended = subprocess.run(
        [command, "finetune"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    (result,) = json.loads((folder / "result.json").read_text())
    assert result["loss_after"] < 0.5 * result["loss_before"]
    assert result["total_rank"] == result["budget"]
    for ranks in result["ranks"].values():
        assert sum(ranks) == 4 * len(ranks)
        assert len(set(ranks)) > 1
    replayed = replay(Recording.open(folder / "recording"))
    assert {n: r.tolist() for n, r in replayed.final_ranks.items()} == result["ranks"]
