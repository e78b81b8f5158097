"""Optimizers that cannot train the adapter are refused or reported at the first steps."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import drlora_torch
from tests.torch import helpers, models


@pytest.mark.parametrize(
    "options",
    [{}, {"router": "trainable"}, {"modules_to_save": "lm_head"}, {"auto_step": False}],
    ids=str,
)
def test_an_optimizer_made_before_attach_is_refused(options: dict[str, Any]) -> None:
    model = models.build()
    optimizer = torch.optim.AdamW(model.parameters())
    adapter = helpers.attach(model, **options)
    model(**helpers.batch()).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(drlora_torch.AttachError, match="parameters of the model, which attach has"):
        optimizer.step()
    assert all(helpers.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    helpers.adamw(adapter).step()  # the backward pass is not lost
    if "auto_step" in options:
        adapter.step()
    assert (adapter.engine.step_count, adapter.skipped_steps) == (1, 0)


def test_an_optimizer_of_a_detached_adapter_is_refused() -> None:
    model = models.build()
    optimizer = helpers.adamw(helpers.attach(model))
    drlora_torch.adapters(model)["default"].detach()
    gc.collect()
    helpers.attach(model)
    model(**helpers.batch()).loss.backward()
    with pytest.raises(drlora_torch.AttachError, match="LoRA of an adapter that is gone"):
        optimizer.step()


def test_an_optimizer_of_an_earlier_model_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """A notebook in which the cell of the optimizer was not run again."""
    optimizer = helpers.adamw(helpers.attach(old := models.build()))
    model = models.build()
    adapter = helpers.attach(model)
    helpers.step(model, optimizer)
    assert "does it belong to an earlier model" in caplog.text
    assert old is not model
    adapter.detach()  # it would go on to wait for an optimizer of its own


def test_optimizers_beside_the_adapters_own_are_left_alone() -> None:
    """Of another model, of a head that is trained beside, of an inactive adapter."""
    gc.collect()  # adapters of other tests would go on to wait for their optimizers
    model = models.build()
    other = helpers.attach(model, adapter_name="other")
    adapter = helpers.attach(model)
    model.lm_head.weight.requires_grad_(True)
    another_model = torch.nn.Linear(2, 2)
    another_model(torch.ones(2)).sum().backward()
    beside = [
        torch.optim.SGD(another_model.parameters(), lr=0.1),
        torch.optim.SGD([model.lm_head.weight], lr=0.1),
        helpers.adamw(other),
    ]
    optimizer = helpers.adamw(adapter)
    for seed in range(3):
        model(**helpers.batch(seed)).loss.backward()
        for each in beside:
            each.step()
        optimizer.step()
        optimizer.zero_grad()
    assert (adapter.engine.step_count, adapter.skipped_steps) == (3, 0)


@pytest.mark.parametrize("mode", ["after_warmup", "trainable"])
def test_routers_may_have_an_optimizer_of_their_own(
    mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()
    model = models.build()
    adapter = helpers.attach(model, router=mode)
    routers = torch.optim.AdamW(adapter.router_parameters().values(), lr=1e-2)
    lora = torch.optim.AdamW(adapter.lora_parameters(), lr=1e-2)
    for seed in range(3):
        model(**helpers.batch(seed)).loss.backward()
        for optimizer in (routers, lora):
            optimizer.step()
            optimizer.zero_grad()
    assert adapter.engine.step_count == 3
    assert caplog.text == ""


def test_an_optimizer_of_an_earlier_run_wants_its_adapter_back(tmp_path: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    helpers.step(model, optimizer)
    adapter.save_pretrained(tmp_path)
    fresh = models.build()
    again = helpers.attach(fresh)
    resumed = helpers.adamw(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh(**helpers.batch(1)).loss.backward()
    with pytest.raises(drlora_torch.AttachError, match="state of the LoRA from an earlier run"):
        resumed.step()
    resumed.zero_grad()
    again.restore(tmp_path)
    assert helpers.step(fresh, resumed, 1) == helpers.step(model, optimizer, 1)


def test_an_optimizer_that_makes_its_state_in_advance_is_a_new_one() -> None:
    adapter = helpers.attach(model := models.build())
    for seed, optimizer in enumerate([torch.optim.Adagrad(adapter.parameters(), lr=1e-2)] * 2):
        assert optimizer.state
        helpers.step(model, optimizer, seed)
    assert adapter.engine.step_count == 2


def test_steps_of_another_network_are_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A critic that steps many times while the adapter accumulates."""
    gc.collect()
    model, critic = models.build(), torch.nn.Linear(2, 2)
    adapter = helpers.attach(model)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    model(**helpers.batch()).loss.backward()
    for _ in range(30):
        critic(torch.ones(2)).sum().backward()
        optimizer.step()
    helpers.adamw(adapter).step()
    assert caplog.text == ""
    assert adapter.engine.step_count == 1
