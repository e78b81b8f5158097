"""Experts without rank, over the table."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import drlora_torch
from tests.torch import helpers, reference
from tests.torch.conformance import tiny
from tests.torch.conformance.test_table import ROUNDING, distance, thinned

pytestmark = pytest.mark.slow
ZERO = {"r_init": 0}


@thinned
def test_growth_from_zero(name: str, tmp_path: Path) -> None:
    """Nothing but the model's own experts runs at first; their routing counts, and they grow."""
    model = tiny.build(name)
    base = copy.deepcopy(model)
    with torch.no_grad():
        want = tiny.output(model, tiny.inputs(name))
    adapter = helpers.attach(model, config=ZERO)
    spy, received = helpers.Spy(adapter), tiny.Received(adapter)
    optimizer = helpers.adamw(adapter)
    with torch.no_grad():
        have = tiny.output(model, tiny.inputs(name))
    assert distance(have, want) < 1e-6  # not 0: where jamba lies in memory changes its last bits
    arguments = tiny.inputs(name, padded=True)
    tiny.loss(tiny.output(model, arguments)).backward()
    for *_, slots in helpers.projections(adapter):
        assert not slots.lora_A.grad.any()
        assert not slots.lora_B.grad.any()
    optimizer.step()
    assert spy.samples[0].keys() == adapter.layers.keys()
    for layer, (phi, importance, tokens) in spy.samples[0].items():
        keep = tiny.kept_tokens(name, layer, arguments)
        np.testing.assert_allclose(phi, received.phi(layer, keep), rtol=1e-6, atol=1e-9)
        assert tokens == sum(keep)
        assert not importance.any()
    for seed in range(4):
        tiny.step(model, name, optimizer, seed)
    for ranks in adapter.ranks().values():
        assert ranks.sum() == 8 * 4 // 2
        assert not ranks.all()
    adapter.save_pretrained(tmp_path)
    loaded = drlora_torch.load(base, tmp_path)
    assert helpers.rank_history(loaded) == helpers.rank_history(adapter)
    with torch.no_grad():
        have = tiny.output(base.eval(), tiny.inputs(name))
        assert torch.equal(have, tiny.output(model.eval(), tiny.inputs(name)))
        assert distance(have, want) > 0.0


@thinned
def test_some_experts_without_rank_compute_dense_weights(name: str) -> None:
    """In the first layer some experts have rank, in the others none has."""
    model = tiny.build(name, exact=True)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model, alpha=3.0, config=ZERO)
    first = next(iter(adapter.layers.values())).lora
    helpers.grow(first, [0, 3, 0, 1, 0, 8, 0, 2])
    helpers.fill(adapter, scale=0.5)
    dense = reference.dense_copy(base, adapter)
    outputs = []
    with tiny.Float64Throughout():
        for one in (model, dense):
            outputs.append(tiny.output(one, tiny.inputs(name)))
            tiny.loss(outputs[-1]).backward()
    assert distance(*outputs) < ROUNDING
    expected, moved = reference.chain_rule(dense, adapter), False
    for layer, projection, lora, slots in helpers.projections(adapter):
        for have, want in zip(
            (slots.lora_A.grad, slots.lora_B.grad), expected[layer, projection], strict=True
        ):
            moved |= bool(have.any())
            assert lora is first or not have.any()
            assert distance(have, want) < ROUNDING, (layer, projection)
    assert moved
