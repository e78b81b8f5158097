"""``register_moe``: MoE models in plain PyTorch, and declarations that are wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drlora_torch
from drlora_torch.models import declaration
from tests.torch import helpers, models, reference
from tests.torch.conventions import handwritten
from tests.torch.conventions.handwritten import (
    Block,
    BypassingBlock,
    DenseBlock,
    DictBlock,
    Model,
    ToldBlock,
    by_gate,
    top_2,
)
from tests.torch.helpers import projections
from tests.torch.test_life import Picture
from tests.torch.waiting import arrive_late

BLOCKS = [Block, DictBlock, DenseBlock, ToldBlock]
DECLARED = {"experts": "experts", "projections": ("w1", "w3", "w2"), "router": "gate"}


@pytest.fixture(autouse=True)
def _declared() -> Iterator[None]:
    before = dict(declaration._DECLARED)
    handwritten.register()
    yield
    declaration._DECLARED.clear()
    declaration._DECLARED.update(before)


def loss_of(model: Any, seed: int = 0) -> Tensor:
    ids = models.tokens(seed=seed)
    flat = model(ids)[:, :-1].reshape(-1, 64)
    return nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))


def experts_of(block: Any) -> list[Any]:
    container = block.experts
    return list(container.values() if isinstance(container, nn.ModuleDict) else container)


@torch.no_grad()
def dense_copy(base: nn.Module, adapter: Any) -> Any:
    dense = copy.deepcopy(base).requires_grad_(False)
    for name, projection, lora, _ in projections(adapter):
        for i, expert in enumerate(experts_of(dense.get_submodule(name))):
            weight = getattr(expert, projection).weight
            weight += reference.expert_delta(lora, projection, i)
            weight.requires_grad_(True)
    return dense


@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_and_gradients(block: type[Block]) -> None:
    base = Model(block)
    model = copy.deepcopy(base)
    before = model(models.tokens())
    adapter = helpers.attach(model)
    assert torch.equal(model(models.tokens()), before)
    helpers.uneven(adapter)
    dense = dense_copy(base, adapter)
    torch.testing.assert_close(model(models.tokens()), dense(models.tokens()))
    loss_of(model).backward()
    loss_of(dense).backward()
    for name, projection, lora, slots in projections(adapter):
        for i, expert in enumerate(experts_of(dense.get_submodule(name))):
            weight = getattr(expert, projection).weight
            dW = torch.zeros_like(weight) if weight.grad is None else weight.grad
            for slot in helpers.owned(lora, i):
                d_A = lora.scaling * (slots.lora_B[slot].detach() @ dW)
                d_B = lora.scaling * (dW @ slots.lora_A[slot].detach())
                torch.testing.assert_close(slots.lora_A.grad[slot], d_A)
                torch.testing.assert_close(slots.lora_B.grad[slot], d_B)


@pytest.mark.parametrize("block", BLOCKS)
def test_life(block: type[Block], tmp_path: Path) -> None:
    """Statistics with padding, growth, saving, loading, merging, detaching."""
    model = Model(block)
    base, picture = copy.deepcopy(model), Picture(model)
    adapter = helpers.attach(model)
    spy, optimizer = helpers.Spy(adapter), helpers.adamw(adapter)
    ids, mask = models.tokens(), torch.ones(3, 7, dtype=torch.int64)
    mask[1:, 4:] = 0
    inputs: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    model(ids, attention_mask=mask).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    weights, index = top_2(model.blocks[0].gate(inputs[0].reshape(-1, 32)))
    dense = torch.zeros(21, models.EXPERTS, dtype=torch.float64).scatter(1, index, weights)
    phi, _, tokens = spy.samples[0]["blocks.0"]
    expected = dense[mask.reshape(-1).bool()].mean(dim=0).detach()
    np.testing.assert_allclose(phi, expected, rtol=1e-12)
    assert tokens == 15
    model.blocks[0]._forward_pre_hooks.popitem()
    for seed in range(6):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(ranks.sum() == 4 * models.EXPERTS for ranks in adapter.ranks().values())
    adapted = model(ids)
    adapter.save_pretrained(tmp_path)
    adapter.detach()
    picture.assert_unchanged(model)
    assert torch.equal(model(ids), base(ids))
    again = drlora_torch.load(base, tmp_path)
    assert torch.equal(base(ids), adapted)
    torch.testing.assert_close(again.merge()(ids), adapted)


class Quantized(nn.Linear):
    """Stands for a Linear of bitsandbytes: integers for weights, a product of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = float(linear.weight.detach().abs().max()) / 127.0
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_quantized_linears_are_adapted_but_not_merged() -> None:
    model = Model(dtype=torch.float32)
    for block in model.blocks:
        for expert in experts_of(block):
            expert.w3 = Quantized(expert.w3)
    before = model(models.tokens())
    adapter = helpers.attach(model, targets=["w3"])
    assert torch.equal(model(models.tokens()), before)
    helpers.uneven(adapter)
    loss_of(model).backward()
    assert all(p.grad.any() for p in adapter.parameters())
    with pytest.raises(drlora_torch.ModelError, match=r"w3 of expert 0 is quantized \(int8\)"):
        adapter.merge()


def test_a_block_on_its_own() -> None:
    """The layer is the model; what is inside is not found again."""
    block = Block().double()
    (layer,) = drlora_torch.discover(block)
    assert (layer.name, layer.router, layer.num_experts) == ("", "gate", models.EXPERTS)


def test_an_undeclared_block_is_refused() -> None:
    declaration._DECLARED.clear()
    model = Model()
    first, second = drlora_torch.discover(model)
    assert (first.name, second.name) == ("blocks.0.experts", "blocks.1.experts")
    assert first.num_experts == models.EXPERTS
    with pytest.raises(drlora_torch.ModelError, match=r"handwritten\.Block.*register_moe"):
        helpers.attach(model)


def test_a_class_that_is_defined_again_is_another_class() -> None:
    """As when a cell of a notebook runs twice: models of the first class keep its declaration."""
    again = type("Block", (nn.Module,), {"__module__": Block.__module__})
    drlora_torch.register_moe(again, **DECLARED, routing=by_gate)  # type: ignore[arg-type]
    assert [layer.obstacle for layer in drlora_torch.discover(Model())] == [None, None]


WRONG_ROUTING = [
    (lambda block, logits: by_gate(block, -logits), "gets . of 21 tokens, but its w1 was called"),
    (lambda block, logits: logits, r"must return \(index, weights\)"),
    (lambda block, logits: top_2(logits), r"must return \(index, weights\)"),
]


@pytest.mark.parametrize(("routing", "message"), WRONG_ROUTING)
def test_wrong_routing_is_noticed(routing: Any, message: str) -> None:
    drlora_torch.register_moe(Block, **DECLARED, routing=routing)  # type: ignore[arg-type]
    model = Model()
    helpers.attach(model)
    with pytest.raises(drlora_torch.ModelError, match=message):
        loss_of(model)


def test_routing_that_becomes_wrong_is_noticed_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the error comes with the statistics of its step."""
    sign = [1.0]
    routing = lambda block, logits: by_gate(block, sign[0] * logits)  # noqa: E731
    drlora_torch.register_moe(Block, **DECLARED, routing=routing)  # type: ignore[arg-type]
    arrive_late(monkeypatch)
    model = Model()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for sign[0] in (1.0, 1.0, -1.0):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(drlora_torch.ModelError, match="tokens, but its w1 was called"):
        adapter.engine.settle()
    assert adapter.engine.step_count == 2
    with (
        pytest.raises(drlora_torch.ModelError, match="tokens, but its w1 was called"),
        torch.no_grad(),
    ):
        loss_of(model)  # no step follows, so it is looked at once


def test_a_linear_that_is_never_called_is_noticed() -> None:
    model = Model(BypassingBlock)
    adapter = helpers.attach(model)
    with pytest.raises(drlora_torch.ModelError, match=r"but its w1 was called with 0"):
        loss_of(model)
    adapter.detach()
    helpers.attach(model, targets=["w2", "w3"])
    loss_of(model).backward()


def test_a_router_that_is_never_called_is_noticed() -> None:
    declared = {**DECLARED, "router": "experts.0"}
    drlora_torch.register_moe(DictBlock, **declared, routing=by_gate)  # type: ignore[arg-type]
    with pytest.raises(drlora_torch.ModelError, match="as register_moe was told"):
        helpers.attach(Model(DictBlock))
    declared = {**DECLARED, "router": "gate"}
    drlora_torch.register_moe(ToldBlock, **declared, routing=by_gate)  # type: ignore[arg-type]
    model = Model(ToldBlock)
    helpers.attach(model)
    with pytest.raises(drlora_torch.ModelError, match="router 'gate' was not called"):
        loss_of(model)


WRONG_DECLARATIONS = [
    ({"experts": "expert"}, "has no attribute `expert`"),
    ({"experts": "gate"}, "'gate' is not a ModuleList or ModuleDict"),
    ({"projections": ("w1", "w4")}, "has no attribute `w4`"),
    ({"router": "router"}, "has no attribute `router`"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_DECLARATIONS)
def test_declarations_that_do_not_fit(changes: Any, message: str) -> None:
    drlora_torch.register_moe(Block, **{**DECLARED, **changes}, routing=by_gate)
    assert message in str(drlora_torch.discover(Model())[0].obstacle)
    with pytest.raises(drlora_torch.ModelError, match=message):
        helpers.attach(Model())


IMPOSSIBLE = [
    ({"block_class": Model()}, "must be a class"),
    ({"experts": ""}, "must name a child"),
    ({"projections": ()}, "projections must name"),
    ({"projections": ("w1", "w1")}, "projections must name"),
    ({"projections": ("mlp.w1",)}, "projections must name"),
    ({"router": 3}, "router must be the name"),
    ({"routing": "gate"}, "routing must be a function"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_impossible_declarations(changes: Any, message: str) -> None:
    arguments = {"block_class": Block, **DECLARED, "routing": by_gate, **changes}
    with pytest.raises(drlora_torch.ModelError, match=message):
        drlora_torch.register_moe(arguments.pop("block_class"), **arguments)


def other_features(model: Any) -> None:
    model.blocks[1].experts[3].w1 = nn.Linear(32, 25)


def other_kind(model: Any) -> None:
    model.blocks[1].experts[3].w1 = nn.Identity()


def on_meta(model: Any) -> None:
    model.blocks[1].experts[3].w1.to("meta")


OBSTACLES = [
    (other_features, "w1 of expert 3 has other features"),
    (other_kind, "w1 of expert 3 is a Identity, not a Linear"),
    (on_meta, "w1 of expert 3 is on the meta device; load the weights first"),
]


@pytest.mark.parametrize(("change", "message"), OBSTACLES)
def test_obstacles(change: Any, message: str) -> None:
    model = Model()
    change(model)
    with pytest.raises(drlora_torch.ModelError, match=message):
        helpers.attach(model)
    assert list(helpers.attach(model, layers=["blocks.0"]).ranks()) == ["blocks.0"]
