"""Checkpoints of a Trainer whose ``trainer_state.json`` is not what a Trainer writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from drlora_torch.errors import CheckpointError
from drlora_torch.storage import trainer_state
from drlora_torch.storage.adapter_file import FILE_NAME
from drlora_torch.storage.run_folder import newest_checkpoint

GOOD = {
    "epoch": 0.5, "global_step": 12, "max_steps": 40, "logging_steps": 1, "eval_steps": 500,
    "save_steps": 4, "train_batch_size": 2, "num_train_epochs": 1, "total_flos": 1.5e9,
    "log_history": [{"loss": 1.0, "step": 1}], "best_metric": None, "stateful_callbacks": {},
    "is_world_process_zero": True, "num_input_tokens_seen": 300,
}  # fmt: skip
WRONG: dict[str, tuple[Any, str]] = {
    "global_step": ("12", "global_step: Input should be a valid integer, got '12'"),
    "max_steps": (-1, "max_steps: Input should be greater than or equal to 0"),
    "save_steps": (-1, "save_steps: Input should be greater than or equal to 0"),
    "eval_steps": (None, "eval_steps: Input should be a valid number"),
    "logging_steps": ("5", "logging_steps: Input should be a valid number"),
    "epoch": (float("nan"), "epoch: Input should be a finite number|greater than or equal to 0"),
    "log_history": ({}, "log_history: Input should be a valid list"),
    "best_model_checkpoint": (3, "best_model_checkpoint: Input should be a valid string"),
    "stateful_callbacks": ([1], "stateful_callbacks: Input should be a valid dictionary"),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_train_epochs", sys.maxsize),  # of a stream without a length
        *(("eval_steps", 0), ("save_steps", 0), ("save_steps", 100.0), ("logging_steps", 0.25)),
    ],
)
def test_what_a_trainer_writes_is_no_damage(field: str, value: Any, tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 12, GOOD | {field: value})
    assert trainer_state.read(made) is not None
    assert newest_checkpoint(tmp_path) == made


def checkpoint(folder: Path, step: int, content: Any) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / FILE_NAME).touch()
    text = content if isinstance(content, str) else json.dumps(content)
    (made / trainer_state.FILE).write_text(text)
    return made


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_kind_is_passed_over_and_said(field: str, tmp_path: Path) -> None:
    value, message = WRONG[field]
    wrong = checkpoint(tmp_path, 12, {**GOOD, field: value})
    with pytest.raises(CheckpointError, match=message):
        trainer_state.read(wrong)
    with (
        pytest.warns(RuntimeWarning, match="passed over for an older one"),
        pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*delete that"),
    ):
        newest_checkpoint(tmp_path)
    older = checkpoint(tmp_path, 8, {**GOOD, "global_step": 8})
    with pytest.warns(RuntimeWarning, match="checkpoint-12 is damaged"):
        assert newest_checkpoint(tmp_path) == older


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "\0"])
def test_a_file_that_was_cut_short_is_no_checkpoint(content: str, tmp_path: Path) -> None:
    assert trainer_state.read(checkpoint(tmp_path, 12, content)) is None
    assert newest_checkpoint(tmp_path) is None


def test_a_state_of_another_kind_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a Trainer's state"):
        trainer_state.read(checkpoint(tmp_path, 12, [1]))


def test_what_a_trainer_writes_is_read(tmp_path: Path) -> None:
    found = trainer_state.read(checkpoint(tmp_path, 12, GOOD))
    assert found is not None
    assert (found.global_step, found.epoch) == (12, 0.5)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
