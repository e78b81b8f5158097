"""TRL's trainers and plain Accelerate loops: statistics of a plain loop, nothing to call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import drlora_torch
from drlora_torch.integrations.trainer import DRLoRACallback
from tests.ecosystem import trainers
from tests.ecosystem.test_trainer import same_statistics
from tests.finetune.conftest import make_tokenizer
from tests.torch import helpers, models

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
VOCABULARY = 258
TEXTS = ["one two", "three", "four five six", "seven eight", "nine", "ten eleven", "twelve", "13"]
ARGUMENTS: dict[str, Any] = {
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "train_sampling_strategy": "sequential",
}


def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


class Inputs:
    """Keeps what the model is given in training, to train a twin on it by hand."""

    def __init__(self, model: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module: Any, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.calls.append(copy.deepcopy({k: v for k, v in kwargs.items() if v is not None}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_statistics_are_those_of_a_plain_loop(tmp_path: Path, checkpointing: bool) -> None:
    model = models.build(vocab_size=VOCABULARY)
    adapter = helpers.attach(model)
    spy, inputs = helpers.Spy(adapter), Inputs(model)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(tmp_path),
            **ARGUMENTS,
            gradient_accumulation_steps=2,
            router_aux_loss_coef=0.0,
            **trainers.renamed({"gradient_checkpointing": checkpointing}),
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS * 4}),
        processing_class=tokenizer(),
        callbacks=[DRLoRACallback(adapter)],
    )
    trainer.train()
    assert len(inputs.calls) == 16

    twin = models.build(vocab_size=VOCABULARY)
    by_hand = helpers.attach(twin)
    plain = helpers.Spy(by_hand)
    optimizer = helpers.adamw(by_hand, weight_decay=0.0)
    for at in range(0, 16, 2):
        calls = inputs.calls[at : at + 2]
        items = sum(int((call["labels"][:, 1:] != -100).sum()) for call in calls)
        for call in calls:
            given = {key: call[key] for key in ("input_ids", "attention_mask", "labels")}
            twin(**given, num_items_in_batch=items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    same_statistics(spy, plain)


def test_dpo_counts_the_trained_forwards_alone(tmp_path: Path) -> None:
    """The reference is the same model with the adapter off: it must count nothing."""
    model = models.build(vocab_size=VOCABULARY)
    adapter = helpers.attach(model)
    spy, log = helpers.Spy(adapter), helpers.RouterLog(adapter)
    reference = models.build(vocab_size=VOCABULARY)
    inputs = Inputs(model)
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(
            str(tmp_path), **ARGUMENTS, **trainers.renamed({"gradient_checkpointing": False})
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": TEXTS * 2, "chosen": [" yes"] * 16, "rejected": [" no, never"] * 16}
        ),
        processing_class=tokenizer(),
        callbacks=[DRLoRACallback(adapter)],
    )
    trainer.train()
    assert len(spy.samples) == len(inputs.calls) == 8
    assert adapter.skipped_steps == 0
    assert adapter.events
    for step, call in enumerate(inputs.calls):
        mask = call["attention_mask"]
        for name, (phi, _, tokens) in spy.samples[step].items():
            assert tokens == int(mask.sum())
            calls = log.calls[name]
            log.calls[name] = [calls[step]]
            np.testing.assert_allclose(phi, log.phi(name, [mask]), rtol=1e-5)
            log.calls[name] = calls


# -- Accelerate --------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_an_accelerate_loop_is_a_plain_loop(clip: float) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = models.build()
    adapter = helpers.attach(model)
    spy = helpers.Spy(adapter)
    optimizer = helpers.adamw(adapter)
    loader: Any = torch.utils.data.DataLoader(
        [{k: v[0] for k, v in helpers.batch(seed, rows=1).items()} for seed in range(32)],  # type: ignore[arg-type]
        batch_size=2,
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(adapter.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()

    twin = models.build()
    by_hand = helpers.attach(twin)
    plain = helpers.Spy(by_hand)
    plain_optimizer = helpers.adamw(by_hand)
    for step in range(8):
        for seed in range(4 * step, 4 * step + 4, 2):
            rows = [helpers.batch(seed + i, rows=1) for i in range(2)]
            batch = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
            (twin(**batch).loss / 2).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), clip)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    same_statistics(spy, plain)
    assert isinstance(adapter, drlora_torch.Adapter)
