"""Every convention beside the interface passes the same tests, on a tiny model of a family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drlora_torch
from tests.torch import helpers, models, reference
from tests.torch.conventions.families import CASES, batch, build
from tests.torch.helpers import projections
from tests.torch.test_life import Picture

ALL = sorted(CASES)


def close(left: Any, right: Any, family: str) -> None:
    rounding = CASES[family].rounding
    torch.testing.assert_close(left, right, rtol=rounding, atol=rounding / 50)


def attach(family: str, model: Any, **options: Any) -> Any:
    return helpers.attach(model, layers=CASES[family].patterns, **options)


def attached(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    model = build(family, dtype)
    adapter = attach(family, model, **options)
    helpers.uneven(adapter)
    return model, adapter


def logits(model: Any, family: str, **changes: Any) -> Tensor:
    found: Tensor = model(**{**batch(family), **changes}).logits
    return found


@torch.no_grad()
def dense_copy(base: nn.Module, adapter: Any, family: str) -> Any:
    """Copy the base model and write W + s B A into the places that the table names."""
    dense = copy.deepcopy(base)
    dense.requires_grad_(False)
    for name, projection, lora, _ in projections(adapter):
        for expert in range(models.EXPERTS):
            parameter, part = CASES[family].locate(dense.get_submodule(name), projection, expert)
            part(parameter.data).add_(reference.expert_delta(lora, projection, expert))
            parameter.requires_grad_(True)
    return dense


@pytest.mark.parametrize("family", ALL)
def test_discovered(family: str) -> None:
    model, row = build(family), CASES[family]
    picture = Picture(model)
    everything = drlora_torch.discover(model)
    attention = row.patterns is not None
    found = [layer for layer in everything if layer.only_on_request == attention]
    picture.assert_unchanged(model)
    assert len(found) == row.layers
    for layer in found:
        assert layer.obstacle is None
        assert layer.convention == row.convention
        assert layer.num_experts == models.EXPERTS
        assert dict(layer.projections) == row.projections
        assert layer.dtype == "float64"
        assert layer.router is not None
        assert isinstance(model.get_submodule(layer.router), nn.Module)
    attach(family, model)
    assert drlora_torch.discover(model) == everything


@pytest.mark.parametrize("family", ALL)
def test_step_0_is_the_base(family: str) -> None:
    model = build(family)
    before = logits(model, family)
    adapter = attach(family, model)
    close(logits(model, family), before, family)
    helpers.uneven(adapter)
    assert not torch.allclose(logits(model, family), before, rtol=1e-3)
    with adapter.disabled():
        assert torch.equal(logits(model, family), before)
    with pytest.raises(drlora_torch.AttachError, match="neither copied nor pickled"):
        copy.deepcopy(model)


@pytest.mark.parametrize("layout", ["pooled", "masked"])
@pytest.mark.parametrize("family", ALL)
def test_outputs_and_gradients_are_those_of_dense_weights(family: str, layout: str) -> None:
    base = build(family)
    model = copy.deepcopy(base)
    adapter = attach(family, model, layout=layout, router="trainable")
    helpers.uneven(adapter)
    dense = dense_copy(base, adapter, family)
    routers = adapter.router_parameters()
    for name in routers:
        dense.get_parameter(name).requires_grad_(True)
    ours, theirs = model(**batch(family)), dense(**batch(family))
    close(ours.logits, theirs.logits, family)
    (ours.loss * 10.0).backward()
    (theirs.loss * 10.0).backward()
    for name, parameter in routers.items():
        wanted = dense.get_parameter(name).grad  # some routers compute in float32
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-7)
    seen = 0
    for name, projection, lora, slots in projections(adapter):
        for expert in range(models.EXPERTS):
            parameter, part = CASES[family].locate(dense.get_submodule(name), projection, expert)
            gradient = parameter.grad
            dW = part(torch.zeros_like(parameter) if gradient is None else gradient)
            for slot in helpers.owned(lora, expert):
                d_A = lora.scaling * (slots.lora_B[slot].detach() @ dW)
                d_B = lora.scaling * (dW @ slots.lora_A[slot].detach())
                close(slots.lora_A.grad[slot], d_A, family)
                close(slots.lora_B.grad[slot], d_B, family)
                seen += bool(d_A.any())
        assert not slots.lora_A.grad[helpers.free(lora)].any()
    assert seen > 10


class Told:
    """Routing as the model itself tells it: the weights of every token and expert, by layer."""

    def __init__(self, model: Any, adapter: Any, family: str) -> None:
        row = CASES[family]
        self.calls: dict[str, list[Tensor]] = {name: [] for name in adapter.layers}
        for name, layer in adapter.layers.items():
            module = layer.experts.get_submodule(row.told) if row.told else layer.experts
            module.register_forward_hook(
                lambda _module, args, output, name=name: self.calls[name].append(
                    row.dense(args, output).detach()
                )
            )


def padded(family: str) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs padded on the right, and the tokens that count."""
    ids = models.tokens(3, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 3:] = 0
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    if CASES[family].encoder_decoder:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return inputs, mask.reshape(-1).bool()


@pytest.mark.parametrize("family", ALL)
def test_statistics(family: str) -> None:
    model, adapter = attached(family)
    told, spy = Told(model, adapter, family), helpers.Spy(adapter)
    optimizer = helpers.adamw(adapter)
    inputs, mask = padded(family)
    for kwargs, counted in ((batch(family), torch.ones_like(mask)), (inputs, mask)):
        model(**kwargs).loss.backward()
        expected = helpers.importance(adapter)
        optimizer.step()
        optimizer.zero_grad()
        for name in adapter.layers:
            phi, s, tokens = spy.samples[-1][name]
            weights = told.calls[name][-1][counted].double()
            np.testing.assert_allclose(phi, weights.mean(dim=0), rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(s, expected[name], rtol=1e-9, atol=1e-14)
            assert tokens == int(counted.sum())
            assert phi.max() > 0
            assert s.max() > 0
    assert len(spy.samples) == 2


@pytest.mark.parametrize("family", ALL)
def test_what_does_not_count(family: str) -> None:
    model, adapter = attached(family)
    with torch.no_grad():
        model(**batch(family))
    with adapter.paused():
        model(**batch(family))
    with adapter.disabled():
        model(**batch(family))
    model.eval()
    model(**batch(family))
    assert helpers.pending(adapter) == {}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", [f for f in ALL if "jetmoe" not in f])  # which has none
def test_checkpointing_counts_once(family: str, reentrant: bool) -> None:
    grads, samples = [], []
    for checkpointing in (False, True):
        model, adapter = attached(family)
        spy, optimizer = helpers.Spy(adapter), helpers.adamw(adapter)
        if checkpointing:
            inner = model.model if family == "step3p7" else model
            helpers.checkpoint_activations(inner, reentrant=reentrant)
        model(**batch(family)).loss.backward()
        grads.append([slots.lora_B.grad.clone() for *_, slots in projections(adapter)])
        optimizer.step()
        samples.append(spy.samples[0])
    for plain, recomputed in zip(*grads, strict=True):
        close(recomputed, plain, family)
    for name, (phi, s, tokens) in samples[0].items():
        np.testing.assert_array_equal(samples[1][name][0], phi)
        np.testing.assert_allclose(samples[1][name][1], s, rtol=1e-9, atol=1e-14)
        assert samples[1][name][2] == tokens


@pytest.mark.parametrize("family", ALL)
def test_growth_detach_and_loading(family: str, tmp_path: Path) -> None:
    model = build(family, torch.float32)
    model(**batch(family))  # some routers note the dtype they meet
    base, picture = copy.deepcopy(model), Picture(model)
    adapter = attach(family, model, router="after_warmup", dropout=0.1)
    optimizer = helpers.adamw(adapter)
    losses = []
    for seed in range(6):
        loss = model(**batch(family, seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(adapter.events) == 2
    for ranks in adapter.ranks().values():
        assert ranks.sum() == 4 * models.EXPERTS
        assert len(set(ranks.tolist())) > 1
    model.eval()
    trained = logits(model, family)
    adapter.save_pretrained(tmp_path)
    loaded = copy.deepcopy(base)
    again = drlora_torch.load(loaded, tmp_path)
    loaded.eval()
    assert torch.equal(logits(loaded, family), trained)
    assert helpers.rank_history(again) == helpers.rank_history(adapter)
    again.detach()
    model.train()
    adapter.detach()
    picture.assert_unchanged(model)
    assert torch.equal(logits(model, family), logits(base, family))


@pytest.mark.parametrize("family", ALL)
def test_merged_outputs_are_the_adapted_ones(family: str) -> None:
    model, adapter = attached(family)
    names = list(build(family).state_dict())
    adapted = logits(model, family)
    assert adapter.merge() is model
    close(logits(model, family), adapted, family)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family", ALL)
def test_one_target_only(family: str) -> None:
    chosen = list(CASES[family].projections)[-1]
    base = build(family)
    model = copy.deepcopy(base)
    adapter = attach(family, model, targets=[chosen])
    helpers.uneven(adapter)
    assert {projection for _, projection, *_ in projections(adapter)} == {chosen}
    dense = dense_copy(base, adapter, family)
    close(logits(model, family), logits(dense, family), family)


@pytest.mark.parametrize("family", ALL)
def test_low_precision(family: str) -> None:
    """A bfloat16 model, and float32 under autocast: dtypes fit and LoRA gradients are finite."""
    model, adapter = attached(family, torch.bfloat16)
    out = model(**batch(family))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    model, adapter = attached(family, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch(family)).loss
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("family", [f for f in ALL if f != "step3p7"])
def test_modules_with_hooks_of_accelerate(family: str) -> None:
    """Its forwards, which move inputs to a module's device, still run, and survive ``detach``."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = build(family)
    moved: list[nn.Module] = []

    class Moving(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            moved.append(module)
            return args, kwargs

    for module in list(model.modules()):
        hooks.add_hook_to_module(module, Moving())
    before = logits(model, family)
    own = {module: vars(module)["_old_forward"] for module in model.modules()}
    adapter = attach(family, model)
    moved.clear()
    close(logits(model, family), before, family)
    ours = {module for module, forward in own.items() if vars(module)["_old_forward"] != forward}
    assert bool(ours) == (CASES[family].convention != "per-expert Linears")
    assert ours <= set(moved)
    helpers.uneven(adapter)
    assert not torch.allclose(logits(model, family), before, rtol=1e-3)
    adapter.detach()
    assert torch.equal(logits(model, family), before)


@pytest.mark.parametrize("family", ["llama4", "dbrx", "jetmoe"])
def test_both_kernels_multiply_weights_wherever_a_convention_keeps_them(family: str) -> None:
    outputs = {}
    for kernel in ("ragged", "grouped"):
        model = build(family, torch.float32).eval()
        helpers.uneven(helpers.attach(model, kernel=kernel, layers=CASES[family].patterns))
        with torch.no_grad():
            outputs[kernel] = model(**batch(family)).logits
    torch.testing.assert_close(outputs["grouped"], outputs["ragged"], rtol=1e-4, atol=1e-5)


def test_grouped_is_refused_for_linears() -> None:
    model = build("switch_transformers", torch.float32)
    with pytest.raises(drlora_torch.AttachError, match=r"one Linear per expert.*kernel='ragged'"):
        helpers.attach(model, kernel="grouped")


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe"])
def test_the_padding_of_an_encoder_is_not_that_of_its_decoder(family: str) -> None:
    """The standard call gives one mask, and no decoder_attention_mask."""
    model, adapter = attached(family)
    optimizer, spy = helpers.adamw(adapter), helpers.Spy(adapter)
    arguments = batch(family)
    ids = arguments["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    optimizer.step()
    tokens = {name: sample[2] for name, sample in spy.samples[0].items()}
    for name, counted in tokens.items():
        assert counted == (int(mask.sum()) if "encoder" in name else ids.numel()), name
    assert len(set(tokens.values())) == 2
