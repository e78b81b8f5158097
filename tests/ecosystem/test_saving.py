"""Where a model is saved and resumed, its adapter is too, also without a callback of ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

import drlora_torch
from drlora_torch.integrations.trainer import DRLoRACallback
from tests.ecosystem import trainers
from tests.marks import slow_but
from tests.torch import helpers, models

FILE = "drlora_adapter.safetensors"
SAVING = {"save_strategy": "steps", "save_steps": 5}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(models.tokens()).logits
    return out


def without_callback(folder: Path, **changes: Any) -> tuple[Any, drlora_torch.Adapter]:
    trainer, adapter = trainers.build(folder, **changes)
    trainer.pop_callback(DRLoRACallback)
    return trainer, adapter


def same_weights(one: drlora_torch.Adapter, other: drlora_torch.Adapter) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(helpers.equal(a.detach(), b.detach()) for a, b in pairs)


@pytest.mark.parametrize("build", [trainers.build, without_callback])
def test_the_model_that_a_trainer_saves_is_the_adapter(tmp_path: Path, build: Any) -> None:
    trainer, _ = build(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    fresh = models.build()
    drlora_torch.load(fresh, tmp_path / "final")
    assert torch.equal(logits(fresh), logits(trainer.model))


ROUTERS = {"router": "trainable"}


@pytest.mark.parametrize(
    "attach", slow_but([{}, {"modules_to_save": "lm_head"}, ROUTERS], [ROUTERS])
)
def test_a_trainer_resumes_without_a_callback(tmp_path: Path, attach: Any) -> None:
    saving = SAVING | {"attach": attach}
    straight, whole = without_callback(tmp_path / "straight", **saving)
    straight.train()
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{trainers.STEPS}")
    resumed, adapter = without_callback(tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert [row["loss"] for row in resumed.state.log_history if "loss" in row] == [
        row["loss"] for row in straight.state.log_history if "loss" in row
    ]
    assert helpers.rank_history(adapter) == helpers.rank_history(whole)
    assert same_weights(adapter, whole)


def test_the_best_model_comes_back_without_a_callback(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    best_first = {"load_best_model_at_end": True, "greater_is_better": True}  # of a falling loss
    trainer, adapter = without_callback(tmp_path, eval_strategy="steps", **saving, **best_first)
    trainer.train()
    best = str(trainer.state.best_model_checkpoint)
    assert not best.endswith(f"-{trainers.STEPS}")
    fresh = models.build()
    assert same_weights(adapter, drlora_torch.load(fresh, best))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("build", [trainers.build, without_callback])
def test_checkpoints_hold_the_trained_part_alone(tmp_path: Path, build: Any) -> None:
    trainer, _ = build(tmp_path, **SAVING)
    trainer.train()
    folder = tmp_path / "checkpoint-5"
    assert not (folder / "config.json").exists()  # it cannot be taken for a whole model
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        assert all(".drlora." in key for key in file.keys())  # noqa: SIM118
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_of_the_base_alone_is_refused(tmp_path: Path) -> None:
    """Of a run before ``attach``, or of an older drlora."""
    trainer, _ = without_callback(tmp_path, **SAVING)
    trainer.train()
    models.build().save_pretrained(tmp_path / "checkpoint-5")
    resumed, adapter = without_callback(tmp_path, **SAVING)
    with pytest.raises(drlora_torch.CheckpointError, match="but not adapter 'default'"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert adapter.engine.step_count == 0


@pytest.mark.slow
def test_a_model_of_ones_own_resumes_too(tmp_path: Path) -> None:
    """No PreTrainedModel: the Trainer writes the whole state dict."""

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.build()

        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch)

    ends = []
    for resume in (False, True):
        model = Own()
        adapter = helpers.attach(model)
        trainer = trainers.Trainer(
            model,
            trainers.arguments(tmp_path, remove_unused_columns=False, **SAVING),
            train_dataset=trainers.rows(),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if resume else None)
        ends.append(adapter)
    assert helpers.rank_history(ends[0]) == helpers.rank_history(ends[1])
    assert same_weights(*ends)


def test_accelerate_saves_and_loads_the_whole_state(tmp_path: Path) -> None:
    """As a user does: no registration, the same losses and ranks after the load."""

    def prepared() -> tuple[Accelerator, Any, Any, drlora_torch.Adapter]:
        model = models.build().train()
        adapter = helpers.attach(model)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, helpers.adamw(adapter))
        return accelerator, model, optimizer, adapter

    def step(accelerator: Accelerator, model: Any, optimizer: Any, seed: int) -> float:
        loss = model(**helpers.batch(seed)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    *one, whole = prepared()
    for seed in range(5):
        step(*one, seed)
    one[0].save_state(str(tmp_path))
    *two, adapter = prepared()
    two[0].load_state(str(tmp_path))
    for seed in range(5, 8):
        assert step(*two, seed) == step(*one, seed)
    assert helpers.rank_history(adapter) == helpers.rank_history(whole)
    assert same_weights(adapter, whole)


def test_the_base_is_saved_with_the_adapter_beside_it(tmp_path: Path) -> None:
    """Also with trained routers: the base model has its own."""
    model = models.build()
    before = logits(model)
    adapter = helpers.attach(model.train(), router="trainable")
    helpers.attach(model, adapter_name="other")
    adapter.activate()
    optimizer = helpers.adamw(adapter)
    for seed in range(5):
        helpers.step(model, optimizer, seed)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(whole), before)
    drlora_torch.load(whole, tmp_path)
    assert torch.equal(logits(whole), wanted)
    loaded = drlora_torch.load(models.build(), tmp_path / "other")
    assert loaded.options.router.value == "frozen"
    assert torch.equal(logits(model), wanted)


def test_routers_learn_after_the_warmup_under_a_trainer(tmp_path: Path) -> None:
    """The Trainer's optimizer holds what requires gradients before the first step."""
    trainer, adapter = trainers.build(tmp_path, attach={"router": "after_warmup"})
    before = {n: p.detach().clone() for n, p in adapter.router_parameters().items()}
    moved: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = adapter.router_parameters()
            moved.append(any(not torch.equal(now[n], value) for n, value in before.items()))

    trainer.add_callback(Watch())
    trainer.train()
    warmup = helpers.CONFIG["warmup_steps"]
    assert moved == [False] * warmup + [True] * (trainers.STEPS - warmup)


def test_a_trainer_takes_a_quantized_base(tmp_path: Path) -> None:
    """Transformers refuses it without an adapter; the flag that says so is PEFT's, and goes."""
    models.build(hidden_size=64).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits)
    plain = trainers.arguments(tmp_path / "run")
    with pytest.raises(ValueError, match="purely quantized"):
        trainers.Trainer(model, plain, train_dataset=trainers.rows())
    before = set(vars(model))
    adapter = helpers.attach(model)
    trainer = trainers.Trainer(model, plain, train_dataset=trainers.rows())
    trainer.train()
    assert (adapter.engine.step_count, adapter.skipped_steps) == (trainers.STEPS, 0)
    trainer.save_model(str(tmp_path / "final"))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    drlora_torch.load(again, tmp_path / "final")
    assert torch.equal(logits(again), logits(model))
    adapter.detach()
    assert set(vars(model)) - before == {"_is_accelerate_prepared"}  # the Trainer's


# -- tied weights, and models inside PEFT ------------------------------------------------------

TIED = {"modules_to_save": "lm_head"}


def tied_trainer(folder: Path) -> tuple[Any, drlora_torch.Adapter]:
    model = models.build(tie_word_embeddings=True)
    adapter = helpers.attach(model, **TIED)
    arguments = trainers.arguments(folder, **SAVING)
    return trainers.Trainer(model, arguments, train_dataset=trainers.rows()), adapter


@pytest.mark.slow
def test_tied_modules_are_saved_and_resumed(tmp_path: Path) -> None:
    straight, whole = tied_trainer(tmp_path)
    straight.train()
    resumed, adapter = tied_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same_weights(adapter, whole)


def test_accelerate_loads_tied_modules(tmp_path: Path) -> None:
    """It writes each shared tensor once, under whichever name comes first."""
    ends = []
    for steps in (3, 0):
        model = models.build(tie_word_embeddings=True).train()
        adapter = helpers.attach(model, **TIED)
        accelerator = Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(model, helpers.adamw(adapter))
        for seed in range(steps):
            helpers.step(prepared, optimizer, seed)
        if steps:
            accelerator.save_state(str(tmp_path))
        else:
            accelerator.load_state(str(tmp_path))
        ends.append(logits(model))
    assert torch.equal(*ends)


def test_the_state_that_accelerate_collects_is_saved_as_the_base(tmp_path: Path) -> None:
    """Its own idiom: ``save_pretrained(..., state_dict=accelerator.get_state_dict(model))``."""
    model = models.build()
    before = logits(model)
    adapter = helpers.attach(model.train(), router="trainable", modules_to_save="lm_head")
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, helpers.adamw(adapter))
    for seed in range(3):
        helpers.step(prepared, optimizer, seed)
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path,
        is_main_process=True,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(prepared),
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(whole), before)
    drlora_torch.load(whole, tmp_path)
    assert torch.equal(logits(whole), logits(model))


peft_warns = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def in_peft(folder: Path, **changes: Any) -> tuple[Any, drlora_torch.Adapter]:
    model = peft.get_peft_model(models.build(), peft.LoraConfig(target_modules=["q_proj"]))
    adapter = helpers.attach(model)
    arguments = trainers.arguments(folder, **changes)
    rows = trainers.rows()
    trainer = trainers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:6])
    return trainer, adapter


@pytest.mark.slow
@peft_warns
def test_a_peft_model_resumes_the_adapter_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    straight, whole = in_peft(tmp_path, **SAVING)
    straight.train()
    torch.manual_seed(0)
    resumed, adapter = in_peft(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert adapter.engine.step_count == trainers.STEPS
    assert helpers.rank_history(adapter) == helpers.rank_history(whole)
    assert same_weights(adapter, whole)


@pytest.mark.slow
@peft_warns
def test_the_best_peft_model_comes_back_whole(tmp_path: Path) -> None:
    best_first = {"load_best_model_at_end": True, "greater_is_better": True}
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer, adapter = in_peft(tmp_path, eval_strategy="steps", **saving, **best_first)
    trainer.train()
    assert adapter.engine.step_count < trainers.STEPS
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@peft_warns
def test_a_peft_model_made_later_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).train()
    optimizer = helpers.adamw(adapter)
    for seed in range(2):
        helpers.step(outer, optimizer, seed)
    assert caplog.text.count("a PeftModel saves and loads that one alone") == 1


@peft_warns
def test_an_adapter_inside_the_model_is_saved_as_before(tmp_path: Path) -> None:
    """PEFT's integration in Transformers: ``model.add_adapter``."""
    model = models.build()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    adapter = helpers.attach(model)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", FILE} <= names
    assert "config.json" not in names
    adapter.detach()
    assert model._hf_peft_config_loaded


@peft_warns
def test_another_adapter_of_peft_leaves_ours_alone(tmp_path: Path) -> None:
    """A reference for DPO, say; only loading the same one again is going back."""
    trainer, adapter = in_peft(tmp_path / "run")
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "first")
    optimizer = helpers.adamw(adapter)
    for seed in range(2):
        helpers.step(trainer.model, optimizer, seed)
    steps = adapter.engine.step_count
    trainer.model.load_adapter(str(tmp_path / "first"), adapter_name="second")
    assert adapter.engine.step_count == steps == trainers.STEPS + 2
    trainer.model.load_adapter(str(tmp_path / "first"), adapter_name="default")
    assert adapter.engine.step_count == trainers.STEPS


@peft_warns
def test_adapters_inside_a_peft_model_keep_their_names(tmp_path: Path) -> None:
    model = peft.get_peft_model(models.build(), peft.LoraConfig(target_modules=["q_proj"]))
    law, other = (helpers.attach(model, adapter_name=name) for name in ("law", "other"))
    law.activate()
    optimizer = helpers.adamw(law)
    helpers.step(model, optimizer)
    model.save_pretrained(tmp_path)
    helpers.step(model, optimizer, 1)
    other.activate()
    model.load_adapter(str(tmp_path), adapter_name="default")
    assert (law.engine.step_count, other.engine.step_count) == (1, 0)
    law.detach()
    helpers.attach(model, adapter_name="third")
    with pytest.raises(drlora_torch.CheckpointError, match="but not 'third' of this model"):
        model.load_adapter(str(tmp_path), adapter_name="default")
