"""What a checkpoint of a run stores beside the adapter, when it is not what a run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer_callback import TrainerControl

from drlora_torch.errors import CheckpointError
from drlora_torch.finetune import stored_callbacks, training
from drlora_torch.finetune.trainers import SFT
from drlora_torch.finetune.watch.metrics_file import MetricsFile

STOPPING = EarlyStoppingCallback.__name__
CALLBACKS = [EarlyStoppingCallback(2), TrainerControl()]
ARGS, COUNTER = CALLBACKS[0].state()["args"], {"early_stopping_patience_counter": 0}
WRONG: dict[str, tuple[Any, str]] = {
    "no object": (3, "EarlyStoppingCallback is 3; accepted: an object with args, attributes"),
    "another part": ({"own": {}}, "EarlyStoppingCallback is .*own"),
    "args are no object": ({"args": [1]}, r"args is \[1\]; accepted: an object with early"),
    "another argument": ({"args": {"patience": 1}}, "args is .*accepted: an object with early"),
    "a method": ({"attributes": {"on_step_end": 5}}, "attributes is .*on_step_end"),
    "another kind": (
        {"args": ARGS, "attributes": {"early_stopping_patience_counter": "0"}},
        "early_stopping_patience_counter is '0'; accepted: int",
    ),
    "true": ({"args": {**ARGS, "early_stopping_patience": True}}, "is True; accepted: int"),
    "second of two": ([{"args": ARGS}, 4], "EarlyStoppingCallback is 4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_stored_callbacks_of_another_kind_are_refused(case: str) -> None:
    stored, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message):
        stored_callbacks.check({STOPPING: stored}, CALLBACKS)
    with pytest.raises(CheckpointError, match=message):
        training._has_ended(TrainerState(stateful_callbacks={STOPPING: stored}), 10)


def test_stored_callbacks_of_a_trainer_are_taken() -> None:
    stored = {type(callback).__name__: callback.state() for callback in CALLBACKS}
    stored_callbacks.check({**stored, "Other": 5}, [*CALLBACKS, object()])
    stored_callbacks.check({STOPPING: [CALLBACKS[0].state()]}, CALLBACKS)


@pytest.mark.parametrize(("waited", "ended"), [(1, False), (2, True), (3, True)])
def test_a_training_has_ended_without_patience(waited: int, ended: bool) -> None:
    stored = {"args": ARGS, "attributes": {"early_stopping_patience_counter": waited}}
    state = TrainerState(stateful_callbacks={STOPPING: stored})
    assert training._has_ended(state, 10) is ended
    assert training._has_ended(TrainerState(global_step=10), 10)
    assert not training._has_ended(TrainerState(stateful_callbacks={STOPPING: {}}), 10)


def test_a_state_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    assert training.read_state(None) is None
    with pytest.raises(CheckpointError, match="is missing or cut short"):
        training.read_state(str(tmp_path))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"a_later_field": 1}))
    with pytest.raises(CheckpointError, match="a_later_field"):
        training.read_state(str(tmp_path))


def test_a_random_state_of_another_kind_is_said(tmp_path: Path) -> None:
    trainer: Any = SFT.__new__(SFT)
    trainer.args = type("Arguments", (), {"world_size": 1})
    torch.save({"python": "no state"}, tmp_path / "rng_state.pth")
    with pytest.raises(CheckpointError, match=r"is damaged: its random state cannot be read"):
        trainer._load_rng_state(str(tmp_path))


def test_rows_of_a_log_that_no_run_writes_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    rows = [
        b'{"step": 1, "loss": 2.0}', b"\xff\xfe", b"[1]", b"[" * 5000, b'{"step": "2"}', b"{",
        b'{"step": 3, "loss": 1.0}', b'{"step": 1, "train_loss": 1.0}', b'{"step": null}',
        b'{"step": 1, "half of a surrogate pair": "\\ud800"}',
        b'{"step": 1, "a": ' + b"[" * 500 + b"]" * 500 + b"}",
    ]  # fmt: skip
    log.write_bytes(b"\n".join(rows))
    MetricsFile(log, TrainerState(global_step=2))
    assert log.read_text() == '{"step":1,"loss":2.0}\n'
