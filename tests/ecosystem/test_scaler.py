"""Transformers' Trainer with a GradScaler: skipped steps count for nothing, as in a plain loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
from torch import inf
from torch.amp import GradScaler
from transformers import Trainer

from tests.ecosystem import trainers
from tests.ecosystem.test_trainer import FILE, same_statistics, training_log
from tests.marks import slow_but
from tests.torch import helpers


def scaler() -> GradScaler:
    return GradScaler("cpu", init_scale=1024.0, growth_interval=3)


class ScalingTrainer(Trainer):
    """A Trainer whose Accelerator has an enabled scaler, which ``fp16=True`` makes on GPUs only.

    Accelerate itself scales the loss with it, steps and skips; the Trainer saves it.
    """

    overflowing: Container[int] = ()  # micro-batches whose loss does
    micro_batches = 0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = scaler()
        self.accelerator.unscale_gradients = self.unscale_gradients

    def unscale_gradients(self) -> None:
        """What Accelerate does before clipping if its mixed precision is fp16."""
        self.accelerator.scaler.unscale_(self.optimizer.optimizer)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.micro_batches += 1
            if self.micro_batches - 1 in self.overflowing:
                loss = loss * inf
        return loss


CASES: dict[str, dict[str, Any]] = {
    "foreach": {"optim": "adamw_torch"},
    "fused": {"optim": "adamw_torch_fused"},
    "clipping": {"optim": "adamw_torch", "max_grad_norm": 0.05},
    "accumulation": {
        "optim": "adamw_torch_fused",
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
}


@pytest.mark.parametrize("case", slow_but(CASES, ["accumulation"]))
def test_skipped_steps_are_those_of_a_plain_loop(tmp_path: Path, case: str) -> None:
    accumulation = CASES[case].get("gradient_accumulation_steps", 1)
    overflowing = {accumulation * 1, accumulation * 5}  # of steps 2 and 6, the first micro-batch
    changes = {"train_sampling_strategy": "sequential", **CASES[case]}
    trainer, adapter = trainers.build(tmp_path, kind=ScalingTrainer, **changes)
    trainer.overflowing = overflowing
    spy = helpers.Spy(adapter)
    trainer.train()
    mine = scaler()
    _, plain = trainers.plain_loop(
        accumulation=accumulation,
        clip=CASES[case].get("max_grad_norm", 0.0),
        scaler=mine,
        overflowing=overflowing,
    )
    same_statistics(spy, plain)
    assert trainer.accelerator.scaler.get_scale() == mine.get_scale() == 512.0
    assert trainer.state.global_step == trainers.STEPS
    assert adapter.engine.step_count == trainers.STEPS - 2
    assert adapter.skipped_steps == 0  # those that the optimizer made and whose statistics failed


def test_resume_with_a_scaler_is_exact(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "kind": ScalingTrainer}
    straight, whole = trainers.build(tmp_path / "straight", **saving)
    straight.overflowing = {2, 5}
    straight.train()
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed, adapter = trainers.build(tmp_path / "resumed", **saving)
    resumed.overflowing = {2}  # the sixth
    resumed.train(resume_from_checkpoint=True)
    logs = [json.dumps(training_log(t), sort_keys=True) for t in (resumed, straight)]
    assert logs[0] == logs[1]  # as text, because a norm that is not finite equals nothing
    assert helpers.rank_history(adapter) == helpers.rank_history(whole)
    held = [(tmp_path / name / FILE).read_bytes() for name in ("straight", "resumed")]
    assert held[0] == held[1]
    assert whole.engine.step_count == trainers.STEPS - 2
