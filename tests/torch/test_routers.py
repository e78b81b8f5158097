"""Router modes: when routers learn, and that the base model keeps its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import drlora_torch
from tests.marks import slow_but
from tests.torch import helpers, models

WITH_ROUTER = sorted(models.FAMILIES)


def routers(model: Any) -> dict[str, Tensor]:
    """Copy the routers' parameters, found without the adapter."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if (".gate." in name or ".router." in name) and "shared" not in name
    }


def changed(model: Any, before: dict[str, Tensor]) -> bool:
    now = routers(model)
    different = {name for name, value in before.items() if not torch.equal(now[name], value)}
    assert different in (set(), set(before))
    return bool(different)


@pytest.mark.parametrize("mode", ["frozen", "after_warmup", "trainable"])
@pytest.mark.parametrize("family", slow_but(WITH_ROUTER, WITH_ROUTER[::3]))
def test_routers_change_only_when_they_should(family: str, mode: str) -> None:
    model = models.build(family)
    before = routers(model)
    assert before
    adapter = helpers.attach(model, router=mode)
    optimizer = helpers.adamw(adapter)
    named = set(adapter.router_parameters())
    assert named == (set() if mode == "frozen" else set(before))
    for seed in range(4):
        learning = mode == "trainable" or (mode == "after_warmup" and seed >= 2)
        for name, parameter in model.named_parameters():
            if name in before:  # a Trainer gives its optimizer what requires gradients now
                assert parameter.requires_grad == (mode != "frozen")
        helpers.step(model, optimizer, seed)
        assert changed(model, before) == learning


def test_attention_and_embeddings_never_learn() -> None:
    model = models.build("qwen2_moe")
    adapter = helpers.attach(model, router="trainable")
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".drlora." in name or name.endswith("mlp.gate.weight") for name in learning)
    assert len(learning) == len(adapter.parameters())


def test_after_warmup_without_warmup_learns_from_the_first_step() -> None:
    model = models.build()
    before = routers(model)
    adapter = helpers.attach(model, router="after_warmup", config={"warmup_steps": 0})
    helpers.step(model, helpers.adamw(adapter))
    assert changed(model, before)


def trained(mode: str = "trainable") -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    """Train a model whose routers learn; it, its adapter, its first routers and logits."""
    model = models.build().eval()
    with torch.no_grad():
        logits = model(models.tokens()).logits
    before = routers(model)
    adapter = helpers.attach(model.train(), router=mode)
    optimizer = helpers.adamw(adapter)
    for seed in range(5):
        helpers.step(model, optimizer, seed)
    return model.eval(), adapter, before, logits


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(models.tokens()).logits


def test_disabled_is_the_base_model_with_its_own_routers() -> None:
    model, adapter, before, base_logits = trained()
    learned, adapted = routers(model), logits_of(model)
    with adapter.disabled():
        assert not changed(model, before)
        assert torch.equal(logits_of(model), base_logits)
        with adapter.disabled():
            assert torch.equal(logits_of(model), base_logits)
        assert torch.equal(logits_of(model), base_logits)
    assert not changed(model, learned)
    assert torch.equal(logits_of(model), adapted)
    assert not torch.equal(adapted, base_logits)


def test_disabled_ends_with_an_error_too() -> None:
    model, adapter, _, base_logits = trained()
    adapted = logits_of(model)
    with pytest.raises(KeyError, match="inside"), adapter.disabled():
        raise KeyError("inside")
    assert torch.equal(logits_of(model), adapted)
    assert not torch.equal(adapted, base_logits)


@pytest.mark.parametrize("inside", [False, True])
def test_detach_restores_the_routers(inside: bool) -> None:
    model, adapter, before, base_logits = trained("after_warmup")
    if inside:
        with adapter.disabled():
            adapter.detach()
    else:
        adapter.detach()
    assert not changed(model, before)
    assert torch.equal(logits_of(model), base_logits)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("inside", [False, True])
def test_trained_values_are_saved_and_loaded(tmp_path: Any, inside: bool) -> None:
    model, adapter, _, base_logits = trained()
    adapted = logits_of(model)
    if inside:
        with adapter.disabled():
            adapter.save_pretrained(tmp_path)
    else:
        adapter.save_pretrained(tmp_path)
    fresh = models.build().eval()
    loaded = drlora_torch.load(fresh, tmp_path)
    assert torch.equal(logits_of(fresh), adapted)
    with loaded.disabled():
        assert torch.equal(logits_of(fresh), base_logits)


def test_merge_keeps_trained_values() -> None:
    model, adapter, before, _ = trained()
    adapted = logits_of(model)
    adapter.merge()
    assert changed(model, before)
    torch.testing.assert_close(logits_of(model), adapted, rtol=2e-5, atol=1e-5)


def test_layers_without_a_known_router() -> None:
    model = models.HandRouted()
    with pytest.raises(drlora_torch.ModelError, match="use router='frozen'"):
        helpers.attach(model, router="trainable")
    assert helpers.attach(model).router_parameters() == {}
