"""Experts without rank: nothing is multiplied, yet they are counted and may grow."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drlora_torch
from drlora_core import saliency as equations
from tests.torch import helpers, models, reference
from tests.torch.conventions import families as conventions

# PEFT asks for an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ZERO = {"r_init": 0}
FAMILY = "qwen3_moe"
CONVENTIONS = sorted(name for name, row in conventions.CASES.items() if row.patterns is None)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=models.tokens(3, 7, 0)).logits
    return found


def count_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules whose own experts function ran."""
    calls: list[Any] = []
    own = type(model.model.layers[0].mlp.experts).forward.__wrapped__

    def counted(module: Any, *inputs: Tensor) -> Tensor:
        calls.append(module)
        result: Tensor = own(module, *inputs)
        return result

    monkeypatch.setattr(
        type(model.model.layers[0].mlp.experts).forward, "__wrapped__", counted, raising=True
    )
    return calls


@pytest.mark.parametrize("layout", ["pooled", "masked"])
def test_a_layer_without_rank_runs_the_models_own_experts(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.build(FAMILY)
    model.set_experts_implementation("eager")
    calls = count_own(model, monkeypatch)
    before = logits(model)
    calls.clear()
    adapter = helpers.attach(model, config=ZERO, layout=layout)
    assert torch.equal(logits(model), before)
    experts = [layer.experts for layer in adapter.layers.values()]
    assert calls == experts
    helpers.grow(adapter.layers["model.layers.1.mlp.experts"].lora, [0, 2, 0, 0, 0, 0, 0, 1])
    calls.clear()
    logits(model)
    assert calls == experts[:1]


def test_the_loss_is_differentiable_and_what_it_reaches_counts() -> None:
    model = models.build(FAMILY)
    adapter = helpers.attach(model, config=ZERO)
    spy, optimizer = helpers.Spy(adapter), helpers.adamw(adapter, weight_decay=0.1)
    start = logits(model)
    other = models.build(FAMILY)
    static = helpers.attach(other)
    seen = helpers.Spy(static)
    frozen = torch.optim.SGD(static.parameters(), lr=0.0)
    for seed in range(3):
        helpers.step(model, optimizer, seed)
        helpers.step(other, frozen, seed)
    assert torch.equal(logits(model), start)
    assert adapter.skipped_steps == 0
    for sample, wanted in zip(spy.samples, seen.samples, strict=True):
        for name, (phi, importance, tokens) in sample.items():
            np.testing.assert_allclose(phi, wanted[name][0], rtol=1e-5)
            assert tokens == wanted[name][2] == 21
            assert not importance.any()
    for name in adapter.layers:
        f, g = adapter.engine.routing_frequency(name), adapter.engine.rank_importance(name)
        assert np.array_equal(f, g)  # nothing is known of any expert
        assert np.array_equal(adapter.engine.saliency(name), f * g)
    helpers.step(model, optimizer, 3)
    assert adapter.events[0].step == 4
    for name, ranks in adapter.ranks().items():
        assert ranks.sum() == 8 * 4 // 2
        assert (
            adapter.events[0].saliency[name][ranks > 0].min()
            >= adapter.events[0].saliency[name][ranks == 0].max()
        )


def test_gradients_are_zero_without_rank_and_those_of_dense_weights_with_it() -> None:
    model = models.build(FAMILY)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model, config=ZERO)
    first, second = (layer.lora for layer in adapter.layers.values())
    helpers.grow(second, [0, 3, 0, 1, 8, 0, 0, 2])
    helpers.fill(adapter)
    dense = reference.dense_copy(base, adapter)
    losses = []
    for one in (model, dense):
        loss = one(**helpers.batch()).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    wanted = reference.chain_rule(dense, adapter)
    for name, projection, lora, slots in helpers.projections(adapter):
        for have, want in zip(
            (slots.lora_A.grad, slots.lora_B.grad), wanted[name, projection], strict=True
        ):
            assert bool(want.any()) == (lora is second)
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-7)
    assert not first.table.ranks().any()


@pytest.mark.parametrize("family", CONVENTIONS)
def test_every_convention_runs_without_rank(family: str) -> None:
    model = conventions.build(family)
    arguments = conventions.batch(family)
    with torch.no_grad():
        before = model(**arguments).logits
    adapter = helpers.attach(model, config=ZERO)
    spy, optimizer = helpers.Spy(adapter), helpers.adamw(adapter)
    with torch.no_grad():
        assert torch.equal(model(**arguments).logits, before)
    for _ in range(5):
        model(**arguments).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(phi.any() for phi, _, _ in spy.samples[0].values())
    assert spy.samples[0].keys() == adapter.layers.keys()
    for ranks in adapter.ranks().values():
        assert ranks.sum() == 16
        assert not ranks.all()
    moved = {bool(slots.lora_B.any()) for *_, slots in helpers.projections(adapter)}
    assert moved == {True}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_without_rank_count_once(reentrant: bool) -> None:
    samples = []
    for checkpointing in (False, True):
        model = models.build(FAMILY)
        adapter = helpers.attach(model, config=ZERO)
        spy, optimizer = helpers.Spy(adapter), helpers.adamw(adapter)
        if checkpointing:
            helpers.checkpoint_activations(model, reentrant=reentrant)
        model.train()
        losses = [helpers.step(model, optimizer, seed) for seed in range(6)]
        samples.append((losses, spy.samples, helpers.rank_history(adapter)))
    assert samples[0][0] == pytest.approx(samples[1][0], rel=1e-6)
    assert samples[0][2] == samples[1][2]
    for one, other in zip(samples[0][1], samples[1][1], strict=True):
        for name in one:
            np.testing.assert_allclose(one[name][0], other[name][0], rtol=1e-6)


def train(model: Any, adapter: drlora_torch.Adapter, optimizer: Any, seeds: range) -> list[float]:
    return [helpers.step(model, optimizer, seed) for seed in seeds]


@pytest.mark.parametrize("layout", ["pooled", "masked"])
def test_a_run_from_zero_is_saved_resumed_exported_and_merged(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = models.build(FAMILY)
    adapter = helpers.attach(model, config=ZERO, layout=layout)
    optimizer = helpers.adamw(adapter)
    train(model, adapter, optimizer, range(5))
    adapter.save_pretrained(tmp_path / "at 5")
    state = copy.deepcopy(optimizer.state_dict())
    want = train(model, adapter, optimizer, range(5, 9))
    again = models.build(FAMILY)
    loaded = drlora_torch.load(again, tmp_path / "at 5")
    resumed = helpers.adamw(loaded)
    resumed.load_state_dict(state)
    assert train(again, loaded, resumed, range(5, 9)) == want
    assert helpers.rank_history(loaded) == helpers.rank_history(adapter)
    assert min(min(ranks) for ranks in helpers.rank_history(adapter).values()) == 0
    adapted = logits(model)
    adapter.export_peft(tmp_path / "peft")
    from peft import PeftModel

    there = PeftModel.from_pretrained(models.build(FAMILY), tmp_path / "peft")
    torch.testing.assert_close(logits(there), adapted, rtol=1e-4, atol=1e-5)
    adapter.merge()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)


def test_both_layouts_and_kernels_train_the_same() -> None:
    runs = {}
    for layout in ("pooled", "masked"):
        model = models.build(FAMILY)
        adapter = helpers.attach(model, config=ZERO, layout=layout)
        losses = train(model, adapter, helpers.adamw(adapter), range(8))
        runs[layout] = losses, helpers.rank_history(adapter)
    assert runs["pooled"] == runs["masked"]
    model = models.build(FAMILY)
    adapter = helpers.attach(model, config=ZERO, kernel="grouped")
    losses = train(model, adapter, helpers.adamw(adapter), range(8))
    assert losses == pytest.approx(runs["pooled"][0], rel=1e-4)
    assert helpers.rank_history(adapter) == runs["pooled"][1]


def test_an_adapter_without_any_rank_is_exported(tmp_path: Path) -> None:
    """PEFT has no rank 0; a rank of 1 that is 0 is the same function."""
    peft = pytest.importorskip("peft")
    model = models.build(FAMILY)
    adapter = helpers.attach(model, config=ZERO)
    assert set(adapter.export_peft(tmp_path).ranks.values()) == {1}
    there = peft.PeftModel.from_pretrained(models.build(FAMILY), tmp_path)
    assert torch.equal(logits(there), logits(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_model_grows_from_zero() -> None:
    runs = []
    for compiled in (False, True):
        model = models.build(FAMILY)
        adapter = helpers.attach(model, config=ZERO)
        called: Any = model
        if compiled:
            called = torch.compile(model, backend="aot_eager", fullgraph=True)
        losses = train(called, adapter, helpers.adamw(adapter), range(7))
        runs.append((losses, helpers.rank_history(adapter)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    assert runs[0][1] == runs[1][1]


def test_without_the_tie_nothing_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken variant: the loss of a model without rank has no gradient."""
    monkeypatch.setattr("drlora_torch.lora.layers.tie", lambda values, lora: values)
    model = models.build(FAMILY)
    adapter = helpers.attach(model, config=ZERO)
    with pytest.raises(RuntimeError, match="does not require grad"):
        helpers.step(model, helpers.adamw(adapter))


def test_importance_at_zero_is_what_others_have_per_visit() -> None:
    f, g = np.array([0.5, 0.3, 0.2, 0.0]), np.array([2.0, 0.4, 7.0, 7.0])
    known = np.array([True, True, False, False])
    found = equations.importance_at_zero(f, g, known, [4])
    np.testing.assert_allclose(found[2:], [2.4 / 0.8 * 0.2, 0.0])
    np.testing.assert_array_equal(equations.importance_at_zero(f, g, ~known & False, [4]), f)
