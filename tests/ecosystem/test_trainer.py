"""Transformers' Trainer: statistics of a plain loop, exact resume, logs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import drlora_torch
from drlora_torch.integrations.metrics import rank_entropy
from drlora_torch.integrations.trainer import (
    DRLoRACallback,
    last_checkpoint,
    move_reporters_last,
)
from tests.ecosystem import trainers
from tests.marks import slow_but
from tests.torch import helpers

FILE = "drlora_adapter.safetensors"


class Reporter(TrainerCallback):
    """Keeps what it is given to log, as TensorBoard's and wandb's callbacks do."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append({**logs, "step": state.global_step})


def same_statistics(have: helpers.Spy, want: helpers.Spy, exact: bool = False) -> None:
    assert len(have.samples) == len(want.samples)
    for ours, theirs in zip(have.samples, want.samples, strict=True):
        assert set(ours) == set(theirs)
        for name, (phi, s, tokens) in ours.items():
            assert tokens == theirs[name][2]
            tolerance = 0.0 if exact else 1e-4
            np.testing.assert_allclose(phi, theirs[name][0], rtol=tolerance)
            np.testing.assert_allclose(s, theirs[name][1], rtol=tolerance, atol=tolerance**2)
    assert helpers.rank_history(have.adapter) == helpers.rank_history(want.adapter)
    assert have.adapter.events


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"max_grad_norm": 0.05},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
    "everything": {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.05,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
}


@pytest.mark.parametrize("case", slow_but(CASES, ["plain", "everything"]))
def test_statistics_are_those_of_a_plain_loop(tmp_path: Path, case: str) -> None:
    changes = {"train_sampling_strategy": "sequential", **CASES[case]}
    trainer, adapter = trainers.build(tmp_path, **changes)
    reporter = Reporter()
    trainer.add_callback(reporter)
    spy = helpers.Spy(adapter)
    trainer.train()
    assert [row["step"] for row in reporter.seen if "loss" in row] == [*range(1, 9)]
    _, plain = trainers.plain_loop(
        accumulation=changes.get("gradient_accumulation_steps", 1),
        clip=changes.get("max_grad_norm", 0.0),
    )
    same_statistics(spy, plain)
    assert adapter.skipped_steps == 0


# -- resume ------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "adamw": {},
    "fused": {"optim": "adamw_torch_fused"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    "dropout and routers": {"attach": {"dropout": 0.2, "router": "after_warmup"}},
    "prune": {"attach": {"config": {"policy": "prune", "r_init": 6}}},
    "masked": {"attach": {"layout": "masked"}, "lr_scheduler_type": "cosine"},
}


def training_log(trainer: Any) -> list[dict[str, Any]]:
    kept = {"loss", "step", "grad_norm", "total_rank", "max_rank", "rank_entropy", "skipped_steps"}
    return [
        {k: v for k, v in row.items() if k in kept}
        for row in trainer.state.log_history
        if "loss" in row
    ]


@pytest.mark.parametrize("case", slow_but(RESUMED, ["dropout and routers"]))
def test_trainers_own_resume_is_exact(tmp_path: Path, case: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5, **RESUMED[case]}
    straight, whole = trainers.build(tmp_path / "straight", **saving)
    straight.train()
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{trainers.STEPS}")
    resumed, adapter = trainers.build(tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert training_log(resumed) == training_log(straight)
    assert helpers.rank_history(adapter) == helpers.rank_history(whole)
    pairs = zip(adapter.parameters(), whole.parameters(), strict=True)
    assert all(helpers.equal(a.detach(), b.detach()) for a, b in pairs)
    held = [(tmp_path / name / FILE).read_bytes() for name in ("straight", "resumed")]
    assert held[0] == held[1]


@pytest.mark.slow
def test_another_folder_must_be_named(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5}
    straight, whole = trainers.build(tmp_path / "old", **saving)
    straight.train()
    checkpoint = tmp_path / "old" / "checkpoint-5"
    lost, _ = trainers.build(tmp_path / "new", **saving)
    with pytest.raises(drlora_torch.CheckpointError, match="resume_from="):
        lost.train(resume_from_checkpoint=str(checkpoint))
    resumed, adapter = trainers.build(tmp_path / "new", **saving)
    resumed.pop_callback(DRLoRACallback)
    resumed.add_callback(DRLoRACallback(adapter, resume_from=checkpoint))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert training_log(resumed) == training_log(straight)
    assert helpers.rank_history(adapter) == helpers.rank_history(whole)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_noticed(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5}
    for name, rate in (("old", 1e-2), ("new", 2e-2)):
        trainers.build(tmp_path / name, **saving, learning_rate=rate)[0].train()
    confused, _ = trainers.build(tmp_path / "new", **saving)
    with pytest.raises(drlora_torch.CheckpointError, match="another checkpoint than"):
        confused.train(resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-5"))


@pytest.mark.slow
def test_a_checkpoint_of_another_step_is_noticed_without_logs(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 100}
    trainers.build(tmp_path, **saving)[0].train()
    confused, adapter = trainers.build(tmp_path, **saving)
    confused.pop_callback(DRLoRACallback)
    confused.add_callback(DRLoRACallback(adapter, resume_from=tmp_path / "checkpoint-1"))
    with pytest.raises(drlora_torch.CheckpointError, match="another checkpoint than"):
        confused.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_last_checkpoint_passes_over_one_that_was_cut_off(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    trainer, _ = trainers.build(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / FILE).unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-strange").mkdir()
    resumed, _ = trainers.build(tmp_path)
    with pytest.raises(drlora_torch.CheckpointError, match="holds no adapter"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_checkpoint_that_was_damaged_is_passed_over(tmp_path: Path) -> None:
    """Without its optimizer, a run once went on with other weights, and nothing was said."""
    trainer, _ = trainers.build(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    with pytest.warns(RuntimeWarning, match="checkpoint-8 is damaged .* optimizer.pt is missing"):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    resumed, _ = trainers.build(tmp_path)
    with pytest.raises(drlora_torch.CheckpointError, match=r"optimizer\.pt is missing; resume"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    state = tmp_path / "checkpoint-4" / "rng_state.pth"
    state.write_bytes(state.read_bytes()[:-1])
    some = pytest.warns(RuntimeWarning, match="is damaged and is passed over")
    with (
        some,
        pytest.raises(
            drlora_torch.CheckpointError, match=r"is damaged \(rng_state\.pth has changed"
        ),
    ):
        last_checkpoint(tmp_path)


def test_the_best_checkpoint_comes_back(tmp_path: Path) -> None:
    trainer, _ = trainers.build(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert (tmp_path / FILE).read_bytes() == (best / FILE).read_bytes()
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(trainer.state.best_metric, rel=1e-6)


# -- logs --------------------------------------------------------------------------------------


def test_ranks_are_logged_to_later_callbacks(tmp_path: Path) -> None:
    trainer, _ = trainers.build(tmp_path, logging_steps=5, eval_strategy="steps", eval_steps=4)
    reporter = Reporter()
    trainer.add_callback(reporter)
    trainer.train()
    for rows in (reporter.seen, trainer.state.log_history):
        trained = {row["step"]: row for row in rows if "loss" in row}
        assert sorted(trained) == [4, 5, 6]  # growth after steps 4 and 6, and every 5
        assert trained[5]["total_rank"] == trained[4]["total_rank"] < trained[6]["total_rank"]
        assert trained[6]["total_rank"] == 2 * 8 * 4
        assert 0.0 < trained[6]["rank_entropy"] < 1.0
        assert trained[6]["skipped_steps"] == 0
        assert all("total_rank" not in row for row in rows if "eval_loss" in row)
    assert not (tmp_path / FILE).exists()  # nothing is saved where the user wants nothing saved


def test_reporters_can_be_moved_behind_the_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    trainer, _ = trainers.build(tmp_path, report_to="tensorboard")
    move_reporters_last(trainer)
    trainer.train()
    reporter = trainer.pop_callback(Reporter)
    rows = [row for row in reporter.seen if "loss" in row]
    assert len(rows) == trainers.STEPS
    assert all("total_rank" in row for row in rows)
    move_reporters_last(trainer)  # nothing left to move
    assert trainer.pop_callback(Reporter) is None


@pytest.mark.slow
def test_training_leaves_the_order_of_callbacks(tmp_path: Path) -> None:
    trainer, _ = trainers.build(tmp_path)
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before


def test_log_history_stays_json(tmp_path: Path) -> None:
    trainer, _ = trainers.build(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["log_history"][-1]["total_rank"] > 0


def test_entropy() -> None:
    assert rank_entropy(np.array([4, 4, 4, 4])) == pytest.approx(1.0)
    assert rank_entropy(np.array([8, 0])) == 0.0
    assert rank_entropy(np.array([0, 0])) == 1.0
    assert rank_entropy(np.array([3])) == 1.0
    share = torch.tensor([0.75, 0.25])
    want = float(-(share * share.log()).sum() / torch.tensor(2.0).log())
    assert rank_entropy(np.array([6, 2])) == pytest.approx(want)
