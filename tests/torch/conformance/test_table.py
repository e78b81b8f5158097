"""One suite that every class of the table passes.

The rows in ``table.py`` that say what they add run always; the whole table with ``-m slow``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.integrations.moe import _default_apply_gate

import drlora_torch
from tests.torch import helpers, reference
from tests.torch.conformance import page, tiny
from tests.torch.conformance.table import FAMILIES
from tests.torch.test_life import Picture


def over_table(
    is_fast: Callable[[str], bool],
    among: Callable[[str], bool] = lambda name: True,
    every: int = 1,
) -> pytest.MarkDecorator:
    """Run a test for every row that this Transformers knows; those that are not fast are slow.

    CI runs one in ``every`` of the slow ones.
    """
    rows = []
    for number, (name, family) in enumerate(FAMILIES.items()):
        if not among(name):
            continue
        unknown = pytest.mark.skipif(
            not family.is_known(name),
            reason=f"Transformers {transformers.__version__} has no {name}",
        )
        slow = [pytest.mark.slow, *([pytest.mark.exhaustive] if number % every else [])]
        rows.append(pytest.param(name, marks=[*([] if is_fast(name) else slow), unknown]))
    return pytest.mark.parametrize("name", rows)


table = over_table(lambda name: bool(FAMILIES[name].fast))
thinned = over_table(lambda name: bool(FAMILIES[name].fast), every=3)
"""For what other tests check too."""


ROUNDING = 1e-11
"""Relative error of outputs and gradients in float64."""


def distance(have: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    have, want = have.detach().double(), want.detach().double()
    return float((have - want).norm() / want.norm().clamp(min=1e-30))


@thinned
def test_step_zero_is_the_base_model(name: str) -> None:
    model = tiny.build(name, exact=True)
    with torch.no_grad(), tiny.Float64Throughout():
        want = tiny.output(model, tiny.inputs(name))
        adapter = helpers.attach(model)
        have = tiny.output(model, tiny.inputs(name))
    assert len(adapter.layers) == FAMILIES[name].layers
    assert distance(have, want) < ROUNDING


@table
def test_outputs_and_gradients_are_those_of_dense_weights(name: str) -> None:
    """Also of every other parameter: routers, embeddings and what lies between."""
    model = tiny.build(name, exact=True)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model, alpha=3.0)
    helpers.uneven(adapter, scale=0.5)
    assert len(set(helpers.rank_history(adapter)[next(iter(adapter.layers))])) > 2
    dense = reference.dense_copy(base, adapter)
    outputs = []
    with tiny.wherever_it_learns(model, adapter) as others, tiny.Float64Throughout():
        for one in (model, dense):
            for parameter in others:
                one.get_parameter(parameter).requires_grad_(True)
            outputs.append(tiny.output(one, tiny.inputs(name)))
            tiny.loss(outputs[-1]).backward()
    with torch.no_grad(), adapter.disabled(), tiny.Float64Throughout():
        assert distance(tiny.output(model, tiny.inputs(name)), outputs[0]) > 1e-3
    assert distance(*outputs) < ROUNDING
    expected = reference.chain_rule(dense, adapter)
    for layer, projection, _, slots in helpers.projections(adapter):
        for have, want in zip(
            (slots.lora_A.grad, slots.lora_B.grad), expected[layer, projection], strict=True
        ):
            assert bool(want.any())
            assert distance(have, want) < ROUNDING, (layer, projection)
    for parameter in others:
        have, want = model.get_parameter(parameter).grad, dense.get_parameter(parameter).grad
        assert (have is None) == (want is None), parameter
        if have is not None:
            assert distance(have, want) < ROUNDING or have.norm() < 1e-12, parameter


@thinned
@pytest.mark.parametrize("checkpointing", ["no", "reentrant", "not reentrant"])
def test_statistics_are_those_of_the_routing_that_experts_receive(
    name: str, checkpointing: str
) -> None:
    """Padding does not count, evaluation does not, and checkpointed layers count once."""
    model = tiny.build(name)
    adapter = helpers.attach(model)
    helpers.fill(adapter)
    optimizer, spy, received = helpers.adamw(adapter), helpers.Spy(adapter), tiny.Received(adapter)
    if checkpointing != "no" and not FAMILIES[name].checkpoints:
        with pytest.raises(ValueError, match="not compatible with gradient checkpointing"):
            helpers.checkpoint_activations(model, reentrant=True)
        return
    if checkpointing != "no":
        helpers.checkpoint_activations(model, reentrant=checkpointing == "reentrant")
    tiny.output(model.eval(), tiny.inputs(name, seed=1))
    arguments = tiny.inputs(name, padded=True)
    tiny.loss(tiny.output(model.train(), arguments)).backward()
    importance = helpers.importance(adapter)
    optimizer.step()
    (samples,) = spy.samples
    for layer, (phi, s, tokens) in samples.items():
        keep = tiny.kept_tokens(name, layer, arguments)
        np.testing.assert_allclose(phi, received.phi(layer, keep), rtol=1e-6, atol=1e-9)
        assert tokens == sum(keep)
        assert phi.any()
        np.testing.assert_allclose(s, importance[layer], rtol=1e-5, atol=1e-9)
    assert samples.keys() == adapter.layers.keys()
    calls = {len(per_layer) for per_layer in received.calls.values()}
    assert calls == ({2} if checkpointing == "no" else {3})


@thinned
def test_both_kernels_agree(name: str) -> None:
    """In float32, which is the widest that the grouped products take; padding included.

    Either is up to 1e-5 from float64 (gemma4, the farthest), so they may be twice that apart.
    """
    results = []
    for kernel in ("ragged", "grouped"):
        model = tiny.build(name)
        adapter = helpers.attach(model, kernel=kernel, router="trainable")
        helpers.uneven(adapter, scale=0.5)
        out = tiny.output(model, tiny.inputs(name, padded=True))
        tiny.loss(out).backward()
        results.append([out, *(parameter.grad for parameter in adapter.parameters())])
    for ragged, grouped in zip(*results, strict=True):
        assert (ragged is None) == (grouped is None)
        if ragged is not None:
            assert distance(grouped, ragged) < 3e-5 or ragged.norm() < 1e-9


@thinned
def test_growth_leaves_the_function(name: str) -> None:
    model = tiny.build(name)
    adapter = helpers.attach(model)
    helpers.fill(adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    with torch.no_grad():
        before = tiny.output(model.eval(), tiny.inputs(name))
    model.train()
    ranks = helpers.rank_history(adapter)
    for seed in range(4):
        tiny.step(model, name, optimizer, seed)
    (event,) = adapter.events
    assert event.step == 4
    assert helpers.rank_history(adapter) != ranks
    with torch.no_grad():
        after = tiny.output(model.eval(), tiny.inputs(name))
    assert distance(after, before) < 1e-6


@thinned
def test_detach_restores_every_bit(name: str) -> None:
    model = tiny.build(name)
    picture = Picture(model)
    with torch.no_grad():
        before = tiny.output(model, tiny.inputs(name))
    adapter = helpers.attach(model, dropout=0.1)
    optimizer = helpers.adamw(adapter)
    losses = [tiny.step(model, name, optimizer) for _ in range(5)]
    assert losses[-1] != losses[0]
    adapter.detach()
    picture.assert_unchanged(model)
    with torch.no_grad():
        assert torch.equal(tiny.output(model, tiny.inputs(name)), before)


@table
def test_saved_adapters_come_back(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for seed in range(5):
        tiny.step(model, name, optimizer, seed)
    adapter.save_pretrained(tmp_path)
    loaded = drlora_torch.load(base, tmp_path)
    assert helpers.rank_history(loaded) == helpers.rank_history(adapter)
    with torch.no_grad():
        want = tiny.output(model.eval(), tiny.inputs(name))
        assert torch.equal(tiny.output(base.eval(), tiny.inputs(name)), want)


@thinned
def test_bfloat16_models_train(name: str) -> None:
    """Routing weights come in float32 or bfloat16, by family; the LoRA is in float32."""
    model = tiny.build(name).to(torch.bfloat16)
    for part in getattr(model, "_keep_in_fp32_modules_strict", None) or ():
        for key, parameter in model.named_parameters():
            if part in key:
                parameter.data = parameter.data.float()
    adapter = helpers.attach(model, router="trainable")
    helpers.fill(adapter)
    optimizer = helpers.adamw(adapter)
    tiny.loss(tiny.output(model, tiny.inputs(name))).backward()
    for *_, slots in helpers.projections(adapter):
        for parameter in (slots.lora_A, slots.lora_B):
            assert parameter.grad.dtype == torch.float32
            assert bool(parameter.grad.isfinite().all())
            assert bool(parameter.grad.any())
    routers = [parameter.grad for parameter in adapter.router_parameters().values()]
    assert any(gradient is not None and bool(gradient.any()) for gradient in routers)
    optimizer.step()
    assert adapter.engine.step_count == 1
    assert adapter.skipped_steps == 0


@pytest.mark.skipif(
    not transformers.__version__.startswith(page.TRANSFORMERS),
    reason=f"the table is of Transformers {page.TRANSFORMERS}",
)
def test_the_table_is_complete() -> None:
    """Every modeling file of Transformers that uses the interface has a row, and no other."""
    folder = Path(transformers.__file__).parent / "models"
    users = {
        path.parent.name
        for path in folder.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    assert {family.module or name for name, family in FAMILIES.items()} == users
    assert len(FAMILIES) == 67


@table
def test_declared_flags(name: str) -> None:
    """Check the rows themselves: the flags that the docs show are those of the class."""
    model = tiny.build(name)
    for record in drlora_torch.discover(model):
        experts: Any = model.get_submodule(record.name)
        own_gate = type(experts)._apply_gate is not _default_apply_gate
        flags = (
            experts.has_gate,
            experts.has_bias,
            experts.is_transposed,
            experts.is_concatenated,
            experts.has_post_expert_norm,
            experts.has_gate and own_gate,
        )
        assert (
            "".join(letter if flag else "-" for letter, flag in zip("GBTCNA", flags, strict=True))
            == FAMILIES[name].flags
        )
        assert record.obstacle is None
        assert record.num_experts == 8
        assert record.router is not None
