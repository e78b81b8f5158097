"""Adapted experts equal dense experts W + s B A, pair by pair: outputs and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.torch import helpers, models, reference
from tests.torch.models import EXPERTS, HandRouted

FAMILIES = [*sorted(models.FAMILIES), "muse_spark"]
F64 = {"rtol": 1e-10, "atol": 1e-12}


def check(
    family: str, index: Tensor, *, layout: str = "pooled", targets: list[str] | None = None
) -> None:
    """Compare an adapted experts module with the reference in float64 for one routing."""
    model = HandRouted(torch.float64, family)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model, layout=layout, targets=targets, alpha=3.0)
    helpers.uneven(adapter)
    width = next(iter(adapter.layers["experts"].record.projections.values())).in_features
    rows = models.hidden(index.shape[0], torch.float64, width=width)
    weights = torch.linspace(0.2, 1.5, index.numel(), dtype=torch.float64).view(index.shape)
    cotangent = models.hidden(index.shape[0], torch.float64, seed=9, width=width)

    dense = reference.dense_copy(base, adapter)
    want_inputs = (rows.clone().requires_grad_(True), weights.clone().requires_grad_(True))
    want = reference.experts_pair_by_pair(dense.experts, want_inputs[0], index, want_inputs[1])
    have_inputs = (rows.clone().requires_grad_(True), weights.clone().requires_grad_(True))
    have = model(have_inputs[0], index, have_inputs[1])
    torch.testing.assert_close(have, want, **F64)

    have.backward(cotangent)
    if want.requires_grad:
        want.backward(cotangent)
    for have_input, want_input in zip(have_inputs, want_inputs, strict=True):
        torch.testing.assert_close(have_input.grad, _gradient(want_input), **F64)
    for _, projection, _, _ in helpers.projections(adapter):
        weight = getattr(dense.experts, projection)
        weight.grad = _gradient(weight)
    expected = reference.chain_rule(dense, adapter)
    for name, projection, _, slots in helpers.projections(adapter):
        torch.testing.assert_close(slots.lora_A.grad, expected[name, projection][0], **F64)
        torch.testing.assert_close(slots.lora_B.grad, expected[name, projection][1], **F64)


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def random_index(num_tokens: int = 11) -> Tensor:
    return models.routing(num_tokens)[0]


ROUTINGS = {
    "random": random_index(),
    "one token": random_index(1),
    "no token": random_index(0),
    "some experts idle": random_index() % 3,
    "all tokens on one expert": torch.full((6, 1), 5),
    "one token on the last expert": torch.tensor([[0, 1], [7, 0], [1, 0]]),
    "the same expert twice": torch.tensor([[4, 4], [0, 4], [2, 2]]),
    "sentinels": torch.tensor([[EXPERTS, 1], [3, EXPERTS], [EXPERTS, EXPERTS], [0, 7]]),
    "only sentinels": torch.full((3, 2), EXPERTS),
}


@pytest.mark.parametrize("layout", ["pooled", "masked"])
@pytest.mark.parametrize("case", ROUTINGS)
def test_every_routing(case: str, layout: str) -> None:
    check("olmoe", ROUTINGS[case], layout=layout)


@pytest.mark.parametrize("case", ["random", "no token", "sentinels", "the same expert twice"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, case: str) -> None:
    check(family, ROUTINGS[case])


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_one_target(family: str, target: str) -> None:
    check(family, random_index(), targets=[target])


def test_reference_matches_the_model_code() -> None:
    """The reference itself equals the eager experts of every family."""
    for family in FAMILIES:
        module = HandRouted(torch.float64, family).experts
        module.config._experts_implementation = "eager"
        first = module.gate_up_proj if module.has_gate else module.up_proj
        width = first.shape[1 if module.is_transposed else 2]
        rows = models.hidden(9, torch.float64, width=width)
        index, weights = models.routing(9, torch.float64)
        want = module(rows, index, weights)
        have = reference.experts_pair_by_pair(module, rows, index, weights)
        torch.testing.assert_close(have, want, **F64)


def test_extreme_values_of_sentinel_rows_do_not_leak() -> None:
    """Whatever weight comes with a sentinel, even NaN, reaches neither output nor gradients."""
    model = HandRouted()
    adapter = helpers.attach(model)
    helpers.uneven(adapter)
    index = torch.tensor([[EXPERTS, 1], [3, EXPERTS]])
    rows = models.hidden(2).requires_grad_(True)
    weights = torch.tensor([[float("nan"), 0.5], [0.5, float("inf")]])
    out = model(rows, index, weights)
    out.sum().backward()
    assert out.isfinite().all()
    assert rows.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_plain_experts(dtype: torch.dtype) -> None:
    """Errors against float64 are no larger than those of the model's own eager experts."""
    model = HandRouted(dtype)
    base = copy.deepcopy(model)
    adapter = helpers.attach(model)
    helpers.uneven(adapter, scale=0.05)
    dense = reference.dense_copy(base, adapter)
    exact = reference.dense_copy(base.double(), adapter)
    index, weights = models.routing(40, dtype)
    rows = models.hidden(40, dtype)
    truth = exact(rows.double(), index, weights.double())
    ours = (model(rows, index, weights).double() - truth).abs()
    theirs = (dense(rows, index, weights).double() - truth).abs()
    assert ours.mean() < 1.5 * theirs.mean()
    assert ours.max() < 2.0 * theirs.max()
