"""The user's optimizer is followed by itself, whoever calls it and whatever else it holds."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, AdamW

import drlora_torch
from tests.torch import helpers, models


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_closures(how: str) -> None:
    """``optimizer.step(closure)`` gives the run of the plain loop."""
    plain = models.build()
    expected = helpers.attach(plain)
    plain_optimizer = helpers.adamw(expected)
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for seed in range(7):

        def closure(seed: int = seed) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(**helpers.batch(seed)).loss
            loss.backward()
            return loss

        loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
        assert loss.item() == helpers.step(plain, plain_optimizer, seed)
    assert helpers.rank_history(adapter) == helpers.rank_history(expected)
    assert adapter.engine.step_count == 7


def test_parameter_groups_and_foreign_parameters() -> None:
    """Groups with other learning rates and parameters of others change nothing in the following."""
    model = models.build()
    adapter = helpers.attach(model)
    foreign = torch.nn.Parameter(torch.ones(3))
    first, *rest = adapter.parameters()
    optimizer = AdamW([{"params": [foreign, first], "lr": 1e-3}, {"params": rest}], lr=1e-2)
    for seed in range(6):
        helpers.step(model, optimizer, seed)
    assert [event.step for event in adapter.events] == [4, 6]


def test_optimizers_of_others_are_not_followed() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    other = torch.nn.Parameter(torch.ones(3))
    other.sum().backward()
    SGD([other], lr=1.0).step()
    assert other.tolist() == [0.0, 0.0, 0.0]
    assert adapter.engine.step_count == 0


def test_part_of_the_lora_is_refused() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = AdamW(adapter.parameters()[:3])
    model(**helpers.batch()).loss.backward()
    before = [p.detach().clone() for p in adapter.parameters()]
    with pytest.raises(drlora_torch.AttachError, match="holds 3 of the adapter's 8"):
        optimizer.step()
    assert all(
        helpers.equal(p.detach(), b) for p, b in zip(adapter.parameters(), before, strict=True)
    )


def test_several_optimizers_with_steps_by_hand() -> None:
    """As the error advises: one optimizer for A, one for B, ``adapter.step()`` after both."""
    runs = []
    for parts in (1, 2):
        model = models.build()
        adapter = helpers.attach(model, auto_step=False)
        parameters = adapter.parameters()
        optimizers = [AdamW(parameters[i::parts], lr=1e-2) for i in range(parts)]
        losses = []
        for seed in range(8):
            loss = model(**helpers.batch(seed)).loss
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            adapter.step()
            losses.append(loss.item())
        runs.append((losses, helpers.rank_history(adapter)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("shared", [False, True])
def test_two_adapters_do_not_mix(shared: bool) -> None:
    """Two models in one process, with an optimizer each or one for both, train as if alone."""
    seeds = (0, 1)
    pairs = [models.build(seed=seed) for seed in seeds]
    adapters = [helpers.attach(model) for model in pairs]
    if shared:
        optimizer = AdamW([p for a in adapters for p in a.parameters()], lr=1e-2)
    else:
        optimizers = [helpers.adamw(adapter) for adapter in adapters]
    losses: dict[int, list[float]] = {0: [], 1: []}
    for seed in range(6):
        for which, model in enumerate(pairs):
            if shared:
                loss = model(**helpers.batch(seed)).loss
                loss.backward()
                losses[which].append(loss.item())
            else:
                losses[which].append(helpers.step(model, optimizers[which], seed))
        if shared:
            optimizer.step()
            optimizer.zero_grad()
    for which in seeds:
        alone = models.build(seed=which)
        adapter = helpers.attach(alone)
        own = helpers.adamw(adapter)
        assert [helpers.step(alone, own, seed) for seed in range(6)] == losses[which]
        assert helpers.rank_history(adapter) == helpers.rank_history(adapters[which])


def test_step_without_gradients_counts_nothing() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    helpers.adamw(adapter).step()
    assert adapter.engine.step_count == 0
