"""The Triton kernels, in Triton's interpreter, against their reference in torch."""

from __future__ import annotations

import importlib
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drlora_torch.lora import rows
from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import grouped, torch_rows
from drlora_torch.lora.kernels.factors import Owned
from drlora_torch.lora.rows import RowGenerator
from drlora_torch.lora.slots import Layout, SlotTable
from drlora_torch.step import importance
from tests.marks import one_in
from tests.torch import test_kernels

triton_rows = pytest.importorskip("drlora_torch.lora.kernels.triton_rows")
N, F, TOP_K, TOKENS = 5, 24, 2, 37
CPU = torch.device("cpu")


@pytest.fixture
def on_rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with small blocks, so that all edges are met."""
    monkeypatch.setattr(triton_rows, "ROWS", 16)
    monkeypatch.setattr(triton_rows, "FEATURES", 16)
    return triton_rows


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def make_owned(ranks: list[int], slots: int = 120) -> Owned:
    table = SlotTable(slots, N, 70, Layout.POOLED)
    table.grow(np.array([1, 1, 0, 1, 0]))
    table.grow(np.array(ranks))  # slots of an expert are not side by side
    return Owned.of(table, CPU)


def make_dispatch(sentinels: bool) -> Dispatch:
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, N + sentinels, (TOKENS, TOP_K), generator=generator)
    index[index == 3] = 0  # an expert without rows
    return Dispatch.sort(index, N)


def alive(rows: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows of sentinels hold anything."""
    return rows[: int(dispatch.offsets[-1])]


@pytest.mark.parametrize(("sentinels", "gather"), one_in(4, product((True, False), repeat=2)))
@pytest.mark.parametrize("ranks", [[2, 0, 1, 4, 3], [0, 36, 17, 1, 0], [66, 0, 40, 0, 0]])
def test_low_rank_products(on_rows: Any, sentinels: bool, gather: bool, ranks: list[int]) -> None:
    dispatch, owned = make_dispatch(sentinels), make_owned(ranks)
    inputs = draw(TOKENS if gather else dispatch.num_pairs, F)
    tokens = dispatch.tokens if gather else None
    factor, other = draw(120, F), draw(120, 40)
    args = (inputs, tokens, factor, owned, dispatch)
    wanted = torch_rows.low_rows(*args, 0.5)
    found = on_rows.low_rows(*args, 0.5)
    within = torch.arange(owned.table.shape[1]) < owned.ranks[dispatch.experts].unsqueeze(-1)
    close(alive(found.where(within, 0.0), dispatch), alive(wanted, dispatch))
    rows, same = draw(dispatch.num_pairs, 40), draw(dispatch.num_pairs, 40)
    on_rows.add_rows_(rows, found, other, owned, dispatch)
    torch_rows.add_rows_(same, wanted, other, owned, dispatch)
    close(alive(rows, dispatch), alive(same, dispatch))
    args = (found, inputs, tokens, factor, owned, dispatch)
    close(on_rows.factor_gradient(*args), torch_rows.factor_gradient(wanted, *args[1:]))


@pytest.mark.parametrize("sentinels", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_weights(on_rows: Any, sentinels: bool, dtype: torch.dtype) -> None:
    dispatch = make_dispatch(sentinels)
    rows, weights = draw(dispatch.num_pairs, F).to(dtype), draw(TOKENS, TOP_K)
    tolerance = {} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    for given in (None, weights):
        found = on_rows.sum_pairs(rows, given, dispatch)
        close(found, torch_rows.sum_pairs(rows, given, dispatch), **tolerance)
    by_row, inputs = weights.reshape(-1)[dispatch.order], draw(TOKENS, F).to(dtype)
    gradient, same = rows.clone(), rows.clone()
    found = on_rows.weigh_(gradient, inputs, dispatch.tokens, by_row, dispatch)
    wanted = torch_rows.weigh_(same, inputs, dispatch.tokens, by_row, dispatch)
    close(found, wanted, **tolerance)
    close(alive(gradient, dispatch), alive(same, dispatch), **tolerance)
    rows[int(dispatch.offsets[-1]) :] = torch.nan
    gathered = on_rows.gather(inputs, dispatch)
    assert torch.equal(
        alive(gathered, dispatch), alive(torch_rows.gather(inputs, dispatch), dispatch)
    )
    cleared = rows.clone()
    on_rows.clear_sentinels_(cleared, dispatch)
    assert torch.equal(alive(cleared, dispatch), alive(rows, dispatch))
    assert not cleared[int(dispatch.offsets[-1]) :].any()
    assert on_rows.sum_pairs(rows, weights, dispatch).isfinite().all()


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("width", [4, 24, 1030])
def test_rows_of_A_are_those_of_numpy(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = RowGenerator(7, "layers.3", "down_proj", width)
    experts, dimensions = torch.tensor([0, 3, 127, 2]), torch.tensor([0, 5, 63, 1])
    wanted = generator.draw_all(experts, dimensions)
    monkeypatch.setattr(rows, "runs_triton", lambda tensor: True)
    assert torch.equal(generator.draw_all(experts, dimensions), wanted)
    other = RowGenerator(8, "layers.3", "down_proj", width)
    assert not torch.equal(other.draw_all(experts, dimensions), wanted)


@pytest.mark.parametrize("features", [8, 1030])
def test_the_gate_is_that_of_torch(features: int) -> None:
    gate = importlib.import_module("drlora_torch.lora.kernels.gate")
    rows, seed = draw(7, 2 * features).requires_grad_(True), draw(7, features)
    first, second = rows.chunk(2, dim=-1)
    wanted = torch.nn.functional.silu(first) * second
    found = gate.silu_and_multiply(rows)
    close(found, wanted)
    ours, theirs = (torch.autograd.grad(each, rows, seed)[0] for each in (found, wanted))
    close(ours, theirs)


@pytest.mark.parametrize("gather", [False, True])
def test_products_and_gradients(
    on_rows: Any, gather: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole kernel with Triton's operations, against the loop over experts."""
    case = {"transposed": False, "gather": gather, "combine": not gather, "bias": True}
    wanted = test_kernels.run("ragged", test_kernels.ROUTINGS["sentinels"], [3, 1, 4, 1, 5],
                              torch.float32, **case)  # fmt: skip
    monkeypatch.setattr(grouped, "_operations", lambda inputs: on_rows)
    found = test_kernels.run("grouped", test_kernels.ROUTINGS["sentinels"], [3, 1, 4, 1, 5],
                             torch.float32, **case)  # fmt: skip
    for left, right in zip(found, wanted, strict=True):
        close(left, right)


def test_importance_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, gradients = [draw(9, 24), draw(5, 1030)], [draw(9, 24) + 1, draw(5, 1030) - 1]
    wanted = importance.mean_sensitivity(weights, gradients)
    monkeypatch.setattr(importance, "runs_triton", lambda tensor: True)
    for found, expected in zip(
        importance.mean_sensitivity(weights, gradients), wanted, strict=True
    ):
        close(found, expected)
