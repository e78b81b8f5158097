"""Loss scaling and non-finite statistics: skipped steps update nothing, nothing moves a rank."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.amp import GradScaler

from drlora_torch.step.routing import sum_weights
from tests.torch import helpers, models
from tests.torch.helpers import Spy


def run(
    scaler: GradScaler | None,
    *,
    fused: bool = False,
    poison: int | None = None,
    late: bool = False,
) -> tuple[Any, Spy, list[float]]:
    """Train 7 steps; before the update of step ``poison`` an infinite gradient arrives.

    Gradients are cleared after the step, or ``late``: between the forward and the backward.
    """
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter, fused=fused)
    spy, losses = Spy(adapter), []
    for seed in range(7):
        loss = model(**helpers.batch(seed)).loss
        losses.append(loss.item())
        if late:
            optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if seed == poison:
            adapter.parameters()[0].grad[0, 0] = torch.inf
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if not late:
            optimizer.zero_grad()
    return adapter, spy, losses


def scaler() -> GradScaler:
    return GradScaler("cpu", init_scale=1024.0, growth_interval=1000)


def assert_same(left: Spy, right: Spy, rtol: float) -> None:
    assert len(left.samples) == len(right.samples)
    for mine, theirs in zip(left.samples, right.samples, strict=True):
        for name, (phi, s, tokens) in mine.items():
            np.testing.assert_allclose(theirs[name][0], phi, rtol=rtol)
            np.testing.assert_allclose(theirs[name][1], s, rtol=rtol)
            assert theirs[name][2] == tokens


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_read_unscaled(fused: bool) -> None:
    """A scale of 2^10 is exact, so the scaled run is the plain run."""
    plain, plain_spy, losses = run(None, fused=fused)
    scaled, scaled_spy, scaled_losses = run(scaler(), fused=fused)
    assert scaled_losses == losses
    assert_same(plain_spy, scaled_spy, rtol=0.0)
    assert helpers.rank_history(plain) == helpers.rank_history(scaled)
    assert scaled.engine.step_count == 7


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_updates_nothing(fused: bool, late: bool) -> None:
    """Neither importance nor routing of the skipped step reaches a later sample."""
    adapter, spy, _ = run(scaler(), fused=fused, poison=2, late=late)
    assert adapter.engine.step_count == 6
    assert adapter.skipped_steps == 0
    assert [len(sample) for sample in spy.samples] == [2] * 6
    assert {tokens for sample in spy.samples for _, _, tokens in sample.values()} == {21}
    assert [event.step for event in adapter.events] == [4, 6]


@pytest.mark.parametrize("fused", [False, True])
def test_unscale_before_clipping(fused: bool) -> None:
    """``scaler.unscale_`` and clipping first, as the PyTorch manual has it."""
    spies = []
    for scale in (None, scaler()):
        model = models.build()
        adapter = helpers.attach(model)
        optimizer = helpers.adamw(adapter, fused=fused)
        spies.append(Spy(adapter))
        loss = model(**helpers.batch()).loss
        if scale is None:
            loss.backward()
        else:
            scale.scale(loss).backward()
            scale.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.5)
        if scale is None:
            optimizer.step()
        else:
            scale.step(optimizer)
    assert_same(*spies, rtol=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite(value: float) -> None:
    """Nothing is updated, the step is counted, warned of once, and no rank moves by it."""
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    helpers.step(model, optimizer)
    names = list(adapter.layers)
    before = [
        np.stack([adapter.engine.routing_frequency(name), adapter.engine.rank_importance(name)])
        for name in names
    ]
    for attempt in range(2):
        model(**helpers.batch()).loss.backward()
        adapter.parameters()[1].grad[0, 0] = value
        if attempt == 0:
            with pytest.warns(RuntimeWarning, match="step 2: .* not finite"):
                optimizer.step()
        else:
            optimizer.step()  # warnings are errors
        for parameter in adapter.parameters():
            parameter.grad = None
        with torch.no_grad():
            adapter.parameters()[1][adapter.parameters()[1].isnan()] = 0.0
    assert adapter.skipped_steps == 2
    assert adapter.engine.step_count == 3
    for name, kept in zip(names, before, strict=True):
        assert adapter.engine.routing_frequency(name).tolist() == kept[0].tolist()
        assert adapter.engine.rank_importance(name).tolist() == kept[1].tolist()


def test_nan_in_every_step_moves_no_rank_by_its_values() -> None:
    """No sample is ever seen, so the events wait."""
    model = models.build()
    adapter = helpers.attach(model, config={"max_growth": 1})
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(6):
            model(**helpers.batch(seed)).loss.backward()
            for parameter in adapter.parameters():
                parameter.grad.fill_(torch.nan)
            optimizer.step()
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.nan_to_num_(0.0)
            optimizer.zero_grad()
    assert ["not finite" in str(warning.message) for warning in caught] == [True]
    assert adapter.skipped_steps == 6
    assert set(map(tuple, helpers.rank_history(adapter).values())) == {(2,) * models.EXPERTS}


def test_nan_of_padding_tokens_is_harmless() -> None:
    index = torch.tensor([[0, 2], [1, 0], [3, 1]])  # 3 is a sentinel
    weights = torch.tensor([[0.5, 0.25], [torch.nan, torch.inf], [torch.nan, 0.75]])
    sums = sum_weights(index, weights, torch.tensor([True, False, True]), num_experts=3)
    assert sums.tolist() == [0.5, 0.75, 0.25, 2.0]
