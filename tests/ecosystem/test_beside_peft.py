"""Attention LoRA by PEFT and expert LoRA by drlora on one model."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

import drlora_torch
from drlora_torch.integrations.trainer import DRLoRACallback
from tests.ecosystem import trainers
from tests.marks import slow_but
from tests.torch import helpers, models

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def wrap(model: Any) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)


def both(order: str) -> tuple[Any, drlora_torch.Adapter]:
    """(PeftModel, adapter), made in one of the three orders."""
    model = models.build()
    if order == "attach first":
        adapter = helpers.attach(model)
        return wrap(model), adapter
    wrapped = wrap(model)
    return wrapped, helpers.attach(wrapped if order == "PeftModel" else model)


def attention(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".default.weight" in name]


def train(wrapped: Any, adapter: drlora_torch.Adapter, steps: int = 7) -> list[float]:
    optimizer = torch.optim.AdamW([*adapter.parameters(), *attention(wrapped)], lr=1e-2)
    return [helpers.step(wrapped, optimizer, seed) for seed in range(steps)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=models.tokens()).logits


ORDERS = ["attach first", "PeftModel", "inside PeftModel"]


def test_the_order_does_not_matter() -> None:
    """Same losses, ranks and weights; both learn, the base does not."""
    results = []
    for order in ORDERS:
        wrapped, adapter = both(order)
        spy = helpers.Spy(adapter)
        losses = train(wrapped, adapter)
        assert adapter.events
        assert adapter.skipped_steps == 0
        assert all(bool(p.grad is None or p.requires_grad) for p in wrapped.parameters())
        learned = {n for n, p in wrapped.named_parameters() if p.requires_grad}
        assert {"drlora" in n or ".default.weight" in n for n in learned} == {True}
        assert any("lora_B.default" in n for n in learned)
        assert any("drlora" in n for n in learned)
        assert all(bool(p.any()) for p in attention(wrapped))
        assert list(adapter.layers) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
        results.append((losses, helpers.rank_history(adapter), [s.keys() for s in spy.samples]))
    assert results[0] == results[1] == results[2]


def test_padding_is_left_out_under_a_peft_model() -> None:
    wrapped, adapter = both("PeftModel")
    spy, log = helpers.Spy(adapter), helpers.RouterLog(adapter)
    ids = models.tokens()
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    optimizer = helpers.adamw(adapter)
    wrapped(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    optimizer.step()
    for name, (phi, _, tokens) in spy.samples[0].items():
        assert tokens == 12
        assert phi == pytest.approx(log.phi(name, [mask]), rel=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_both_are_saved_and_loaded(tmp_path: Path, order: str) -> None:
    wrapped, adapter = both(order)
    train(wrapped, adapter)
    wrapped.save_pretrained(tmp_path / "peft")
    adapter.save_pretrained(tmp_path / "drlora")
    held = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert held
    assert not [name for name in held if "drlora" in name or "experts" in name]
    want = logits(wrapped)
    first = peft.PeftModel.from_pretrained(models.build(), tmp_path / "peft")
    drlora_torch.load(first, tmp_path / "drlora")
    assert torch.equal(logits(first), want)
    base = models.build()
    drlora_torch.load(base, tmp_path / "drlora")
    second = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    assert torch.equal(logits(second), want)


@pytest.mark.parametrize("order", ORDERS)
def test_both_are_merged_in_either_order(order: str) -> None:
    for peft_first in (True, False):
        wrapped, adapter = both(order)
        train(wrapped, adapter)
        want = logits(wrapped)
        if peft_first:
            plain = wrapped.merge_and_unload()
            adapter.merge()
        else:
            adapter.merge()
            plain = wrapped.merge_and_unload()
        assert not [name for name, _ in plain.named_parameters() if "lora" in name]
        torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-4)


def test_detach_leaves_peft_as_it_was() -> None:
    model = models.build()
    wrapped = wrap(model)
    before = {name: (p.requires_grad, p.clone()) for name, p in wrapped.named_parameters()}
    helpers.attach(wrapped).detach()
    after = dict(wrapped.named_parameters())
    assert after.keys() == before.keys()
    for name, (required, value) in before.items():
        assert after[name].requires_grad == required
        assert torch.equal(after[name], value)


def test_several_adapters_around_get_peft_model() -> None:
    """One from before it and one from after: PEFT's LoRA learns beside whichever is active."""
    model = models.build()
    first = helpers.attach(model, adapter_name="first", router="trainable")
    wrapped = wrap(model)
    second = helpers.attach(wrapped, adapter_name="second", router="trainable")
    assert list(drlora_torch.adapters(wrapped)) == ["first", "second"]
    for adapter in (second, first, second):
        drlora_torch.set_adapter(wrapped, adapter.name)
        learning = {id(p) for p in wrapped.parameters() if p.requires_grad}
        assert learning == {id(p) for p in [*adapter.parameters(), *attention(wrapped)]}
        train(wrapped, adapter, steps=2)
    assert [adapter.engine.step_count for adapter in (first, second)] == [2, 4]
    for adapter in (first, second):
        adapter.detach()
    assert all(parameter.requires_grad for parameter in attention(wrapped))


def test_export_is_of_the_base_models_names(tmp_path: Path) -> None:
    _, adapter = both("PeftModel")
    helpers.uneven(adapter)
    adapter.export_peft(tmp_path)
    alone = helpers.attach(models.build())
    helpers.uneven(alone)
    alone.export_peft(tmp_path / "alone")
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_experts_that_peft_adapts_are_refused() -> None:
    config = peft.LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"], target_modules=[])
    wrapped = peft.get_peft_model(models.build(), config)
    names = [name for name, _ in wrapped.named_parameters()]
    with pytest.raises(drlora_torch.AttachError, match=r"PEFT adapts the experts of 'model.layers"):
        helpers.attach(wrapped)
    assert [name for name, _ in wrapped.named_parameters()] == names


def test_lora_that_peft_froze_is_warned_of() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    parameters = adapter.parameters()
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW([*parameters, *attention(wrapped)], lr=1e-2)
    with pytest.warns(RuntimeWarning, match=r"call adapter.parameters\(\) after that"):
        helpers.step(wrapped, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        helpers.step(wrapped, optimizer)  # said once
    adapter.parameters()
    helpers.step(wrapped, optimizer)
    assert adapter.engine.step_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("order", slow_but(ORDERS, ORDERS[:1]))
def test_trainer_trains_and_resumes_both(tmp_path: Path, order: str) -> None:
    def build(folder: Path) -> tuple[Trainer, drlora_torch.Adapter]:
        wrapped, adapter = both(order)
        arguments = trainers.arguments(folder, save_strategy="steps", save_steps=5)
        callbacks = [DRLoRACallback(adapter)]
        return Trainer(
            wrapped, arguments, train_dataset=trainers.rows(), callbacks=callbacks
        ), adapter

    straight, whole = build(tmp_path / "straight")
    straight.train()
    assert whole.events
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-8")
    resumed, adapter = build(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (straight, resumed)]
    assert losses[0] == losses[1]
    assert helpers.rank_history(adapter) == helpers.rank_history(whole)
