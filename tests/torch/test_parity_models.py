"""Whole models: step 0 is the base model, later steps are the dense model W + s B A."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.torch import helpers, models, reference
from tests.torch.models import HandRouted

FAMILIES = sorted(models.FAMILIES)
F32 = {"rtol": 2e-5, "atol": 1e-5}  # float32 rounding of two layers in another order of sums


def relative(have: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((have.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("layout", ["pooled", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_zero_is_the_base_model(family: str, layout: str) -> None:
    model = models.build(family)
    with torch.no_grad():
        want = model(models.tokens()).logits
        adapter = helpers.attach(model, layout=layout)
        have = model(models.tokens()).logits
    torch.testing.assert_close(have, want, **F32)
    assert all(bool(slots.lora_A.any()) for *_, slots in helpers.projections(adapter))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_dense_model(family: str) -> None:
    model = models.build(family)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model, router="trainable", alpha=3.0)
    helpers.uneven(adapter)
    dense = reference.dense_copy(base, adapter)
    for name in adapter.router_parameters():
        dense.get_parameter(name).requires_grad_(True)
    inputs = {}
    for which, one in (("dense", dense), ("ours", model)):
        embedded = one.get_input_embeddings()(models.tokens()).detach().requires_grad_(True)
        out = one(inputs_embeds=embedded, labels=models.tokens())
        out.loss.backward()
        inputs[which] = (out.logits, out.loss, embedded.grad)
    for have, want in zip(inputs["ours"], inputs["dense"], strict=True):
        torch.testing.assert_close(have, want, **F32)
        assert relative(have.detach(), want.detach()) < 5e-6
    expected = reference.chain_rule(dense, adapter)
    for name, projection, _, slots in helpers.projections(adapter):
        for have, want in zip(
            (slots.lora_A.grad, slots.lora_B.grad), expected[name, projection], strict=True
        ):
            assert relative(have, want) < 5e-6
    for name, parameter in adapter.router_parameters().items():
        assert relative(parameter.grad, dense.get_parameter(name).grad) < 5e-6


def test_frozen_parts_get_no_gradient() -> None:
    model = models.build("qwen2_moe")
    adapter = helpers.attach(model)
    helpers.uneven(adapter)
    model(**helpers.batch()).loss.backward()
    ours = {id(parameter) for parameter in adapter.parameters()}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in ours) == (parameter.grad is not None), name


def test_only_routed_experts_change() -> None:
    """Shared experts, dense layers and attention hold the same tensors, bit for bit."""
    for family in ("qwen2_moe", "deepseek_v3", "nemotron_h"):
        model = models.build(family)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modules = {name for name, _ in model.named_modules()}
        adapter = helpers.attach(model)
        helpers.uneven(adapter)
        optimizer = helpers.adamw(adapter)
        helpers.step(model, optimizer)
        after = model.state_dict()
        assert all(helpers.equal(after[name], value) for name, value in before.items())
        added = {name for name, _ in model.named_modules()} - modules
        assert added
        assert all(any(name.startswith(f"{e}.drlora") for e in adapter.layers) for name in added)


def _experts_under(
    regime: str, module: Any, rows: Tensor, routing: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    index, weights = routing
    rows = rows.clone().requires_grad_(True)
    if regime == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(rows, index, weights)
    else:
        out = module(rows, index, weights)
    out.sum().backward()
    return out.detach(), rows.grad


@pytest.mark.parametrize("regime", ["autocast", "bfloat16 base"])
def test_mixed_precision_rounds_like_the_model_code(regime: str) -> None:
    """LoRA in float32 in both; errors against float64 stay near those of eager experts."""
    dtype = torch.float32 if regime == "autocast" else torch.bfloat16
    model = HandRouted(dtype)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    helpers.uneven(adapter, scale=0.05)
    dense = reference.dense_copy(base, adapter)
    exact = reference.dense_copy(copy.deepcopy(base).double(), adapter)
    index, weights = models.routing(60, dtype)
    rows = models.hidden(60, dtype)
    ours = _experts_under(regime, model, rows, (index, weights))
    theirs = _experts_under(regime, dense, rows, (index, weights))
    truth = _experts_under("plain", exact, rows.double(), (index, weights.double()))
    for have, eager, want in zip(ours, theirs, truth, strict=True):
        assert have.dtype == eager.dtype or regime == "autocast"
        assert relative(have, want) < 1.5 * relative(eager, want)
    expected = reference.chain_rule(exact, adapter)
    for name, projection, _, slots in helpers.projections(adapter):
        for have, want in zip(
            (slots.lora_A.grad, slots.lora_B.grad), expected[name, projection], strict=True
        ):
            assert have.dtype == torch.float32
            assert relative(have, want) < 4 * 2.0**-8  # a few roundings to 8 bits


def test_autocast_whole_model_trains_in_bfloat16_and_keeps_float32_lora() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**helpers.batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert adapter.engine.step_count == 4


def test_dtype_option() -> None:
    for dtype, expected in (("bfloat16", torch.bfloat16), (torch.float64, torch.float64)):
        adapter = helpers.attach(models.build(), dtype=dtype)
        assert {p.dtype for p in adapter.parameters()} == {expected}


def test_dropout_drops_and_rescales_inputs_of_the_low_rank_part_only() -> None:
    """With the same random numbers, the output is W x + s B A (mask * x / (1 - p))."""
    model = HandRouted(torch.float64)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model, dropout=0.4, targets=["down_proj"])
    helpers.uneven(adapter)
    rows, index = models.hidden(20, torch.float64), torch.full((20, 1), 5)
    weights = torch.full((20, 1), 0.7, dtype=torch.float64)
    inner = base.experts._apply_gate(rows @ base.experts.gate_up_proj[5].T)
    torch.manual_seed(3)
    have = model(rows, index, weights)
    torch.manual_seed(3)
    dropped = functional.dropout(inner, 0.4)
    assert bool((dropped == 0).any())
    delta = reference.expert_delta(adapter.layers["experts"].lora, "down_proj", 5)
    want = 0.7 * (inner @ base.experts.down_proj[5].T + dropped @ delta.T)
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)


def test_dropout_is_off_in_eval() -> None:
    outputs = []
    for dropout in (0.0, 0.5):
        model = models.build()
        helpers.uneven(helpers.attach(model, dropout=dropout))
        with torch.no_grad():
            outputs.append(model.eval()(models.tokens()).logits)
            different = model.train()(models.tokens()).logits
        assert torch.equal(different, outputs[0]) == (dropout == 0.0)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool, dropout: float) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = models.build()
        adapter = helpers.attach(model, dropout=dropout)
        helpers.uneven(adapter)
        if checkpointing:
            helpers.checkpoint_activations(model, reentrant=reentrant)
        torch.manual_seed(5)
        model(**helpers.batch(), use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    assert all(helpers.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(bool(gradient.any()) for gradient in gradients[0])
