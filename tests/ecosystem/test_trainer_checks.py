"""What DRLoRACallback repairs and refuses before training: frozen LoRA, another optimizer."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import drlora_torch
from drlora_torch.integrations.checks import check_losses
from drlora_torch.integrations.trainer import DRLoRACallback
from tests.ecosystem import trainers
from tests.ecosystem.test_trl import ARGUMENTS, TEXTS, VOCABULARY, tokenizer
from tests.torch import helpers, models

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
BALANCING = "the routers are frozen, but their balancing loss is on (router_aux_loss_coef=0.0"


def fine_tune(folder: Path, model: Any, callbacks: Any, **changes: Any) -> SFTTrainer:
    peft_config = changes.pop("peft_config", None)
    values = {"gradient_checkpointing": False, **changes}
    return SFTTrainer(
        model,
        SFTConfig(str(folder), **{**ARGUMENTS, **trainers.renamed(values)}),
        train_dataset=Dataset.from_dict({"text": TEXTS * 2}),
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def attention() -> Any:
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])


def moved(trainer: Any) -> set[str]:
    """Train; which kinds of parameters have changed."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    kinds = {"drlora": "experts", ".default.": "PEFT", "mlp.gate": "routers"}
    found = {next((k for mark, k in kinds.items() if mark in name), "base") for name in changed}
    experts = [name for name in before if "drlora" in name]
    assert "experts" not in found or set(experts) <= set(changed)
    return found


# -- frozen after attach -----------------------------------------------------------------------


@pytest.mark.parametrize("router", ["frozen", "trainable"])
def test_peft_config_of_sft_trains_the_experts_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, router: Any
) -> None:
    model = models.build(vocab_size=VOCABULARY)
    adapter = helpers.attach(model, router=router)
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        trainer = fine_tune(tmp_path, model, [DRLoRACallback(adapter)], peft_config=attention())
    assert caplog.text.count("the expert LoRA was frozen after attach") == 1
    assert moved(trainer) == {"experts", "PEFT"} | ({"routers"} if router == "trainable" else set())
    assert adapter.events
    assert adapter.skipped_steps == 0
    assert adapter.engine.step_count == 8


def build(folder: Path, adapter: drlora_torch.Adapter, **options: Any) -> Trainer:
    return Trainer(
        adapter.model, trainers.arguments(folder), train_dataset=trainers.rows(), **options
    )


def test_a_model_that_the_user_froze_after_attach_is_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = helpers.attach(models.build())
    callback = DRLoRACallback(adapter)
    adapter.model.requires_grad_(False)
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        trainer = build(tmp_path, adapter, callbacks=[callback])
    assert "requires gradients again" in caplog.text
    assert moved(trainer) == {"experts"}
    assert adapter.events


@pytest.mark.slow
def test_nothing_is_said_where_nothing_was_frozen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = helpers.attach(models.build())
    with caplog.at_level(logging.INFO, "drlora_torch"):
        build(tmp_path, adapter, callbacks=[DRLoRACallback(adapter)]).train()
    assert caplog.text == ""


# -- an optimizer without the adapter ----------------------------------------------------------


def test_an_optimizer_from_before_attach_is_refused_when_training_begins(tmp_path: Path) -> None:
    model = models.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    adapter = helpers.attach(model)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = build(
        tmp_path, adapter, callbacks=[DRLoRACallback(adapter)], optimizers=(optimizer, None)
    )
    message = r"lacks 8 of the adapter's 8 parameters(.|\n)*Right:(.|\n)*attach\(model, engine\)"
    with pytest.raises(drlora_torch.AttachError, match=message):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_callback_that_came_too_late_is_told(tmp_path: Path) -> None:
    """Added after the LoRA was frozen and the optimizer made."""
    model = models.build(vocab_size=VOCABULARY)
    adapter = helpers.attach(model)
    trainer = fine_tune(tmp_path, model, [], peft_config=attention())
    trainer.create_optimizer()
    trainer.add_callback(DRLoRACallback(adapter))
    with pytest.raises(drlora_torch.AttachError, match="while they were frozen"):
        trainer.train()


@pytest.mark.parametrize("router", ["trainable", "after_warmup"])
def test_an_optimizer_that_lacks_the_routers_is_refused(tmp_path: Path, router: Any) -> None:
    adapter = helpers.attach(models.build(), router=router)
    optimizer = torch.optim.AdamW(adapter.lora_parameters(), lr=1e-2)
    trainer = build(
        tmp_path, adapter, callbacks=[DRLoRACallback(adapter)], optimizers=(optimizer, None)
    )
    with pytest.raises(drlora_torch.AttachError, match="lacks 2 of the adapter's 10 parameters"):
        trainer.train()


def test_what_the_user_steps_is_left_to_the_user(tmp_path: Path) -> None:
    adapter = helpers.attach(models.build(), auto_step=False)
    optimizer = torch.optim.AdamW(adapter.lora_parameters()[:2], lr=1e-2)
    build(
        tmp_path, adapter, callbacks=[DRLoRACallback(adapter)], optimizers=(optimizer, None)
    ).train()


def test_without_the_callback_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    model.lm_head.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=1e-2)
    said = "no optimizer may hold it"
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        for seed in range(19):
            helpers.step(model, optimizer, seed)
        assert said not in caplog.text
        for seed in range(30):
            helpers.step(model, optimizer, seed)
    assert caplog.text.count(said) == 1
    assert adapter.engine.step_count == 0


# -- the balancing loss ------------------------------------------------------------------------


@pytest.mark.slow
def test_trls_balancing_loss_is_advised_against_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.build(vocab_size=VOCABULARY, router_aux_loss_coef=0.01)
    adapter = helpers.attach(model)
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        for _ in range(2):
            fine_tune(tmp_path, model, [DRLoRACallback(adapter)], max_steps=1).train()
    assert caplog.text.count(BALANCING) == 1
    assert "router_aux_loss_coef=0.0" in caplog.text


@pytest.mark.parametrize(
    ("attach", "changes"),
    [({"router": "trainable"}, {}), ({}, {"router_aux_loss_coef": 0.0})],
    ids=["trained", "off"],
)
def test_a_balancing_loss_that_can_work_or_is_off_is_not(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    attach: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    model = models.build(vocab_size=VOCABULARY)
    adapter = helpers.attach(model, **attach)
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        fine_tune(tmp_path, model, [DRLoRACallback(adapter)], max_steps=1, **changes).train()
    assert "balancing" not in caplog.text


def test_a_model_without_such_a_loss_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Older versions of TRL have a coefficient for every model."""
    adapter = helpers.attach(models.HandRouted())
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        check_losses(adapter, SimpleNamespace(router_aux_loss_coef=0.001), adapter.model)
    assert caplog.text == ""


def test_dpo_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.build(vocab_size=VOCABULARY, router_aux_loss_coef=0.01)
    adapter = helpers.attach(model)
    arguments = {**ARGUMENTS, "max_steps": 1, **trainers.renamed({"gradient_checkpointing": False})}
    trainer = DPOTrainer(
        model,
        ref_model=models.build(vocab_size=VOCABULARY),
        args=DPOConfig(str(tmp_path), **arguments),
        train_dataset=Dataset.from_dict(
            {"prompt": TEXTS, "chosen": [" yes"] * 8, "rejected": [" no"] * 8}
        ),
        processing_class=tokenizer(),
        callbacks=[DRLoRACallback(adapter)],
    )
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        trainer.train()
    assert caplog.text.count(BALANCING) == 1


@pytest.mark.parametrize("active", [False, True])
def test_attach_says_it_of_a_model_that_adds_the_loss_itself(
    caplog: pytest.LogCaptureFixture, active: bool
) -> None:
    changes = {"router_aux_loss_coef": 0.01, "output_router_logits": active}
    with caplog.at_level(logging.WARNING, "drlora_torch"):
        helpers.attach(models.build(**changes), router="trainable")
        assert caplog.text == ""
        helpers.attach(models.build(**changes))
    assert caplog.text.count(BALANCING) == int(active)
