"""Optimizers that hold the adapter: one steps the LoRA, in its dtype, and nothing is left out."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import drlora_torch
from tests.marks import one_in
from tests.torch import helpers, models


def test_two_optimizers_of_the_same_lora_are_refused() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    first, second = helpers.adamw(adapter), torch.optim.SGD(adapter.parameters(), lr=1e-3)
    model(**helpers.batch()).loss.backward()
    first.step()
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    with pytest.raises(drlora_torch.AttachError, match="AdamW and now the SGD step the LoRA"):
        second.step()
    assert all(map(helpers.equal, before, adapter.parameters()))
    first.zero_grad()
    helpers.step(model, second)  # one optimizer may take over from another
    assert (adapter.engine.step_count, adapter.skipped_steps) == (2, 0)


OTHERS = {
    "routers": {"router": "trainable"},
    "routers later": {"router": "after_warmup"},
    "head": {"modules_to_save": "lm_head"},
    "attention": {"attention_rank": 2},
}


@pytest.mark.parametrize("options", one_in(3, ((each,) for each in OTHERS.values())), ids=OTHERS)
def test_an_optimizer_that_lacks_what_else_learns_is_refused(options: dict[str, Any]) -> None:
    gc.collect()
    model = models.build()
    adapter = helpers.attach(model, **options)
    experts = [p for _, _, _, slots in helpers.projections(adapter) for p in slots.parameters()]
    optimizer = torch.optim.AdamW(experts, lr=1e-2)
    model(**helpers.batch()).loss.backward()
    with pytest.raises(drlora_torch.AttachError, match="other parameters that the adapter trains"):
        optimizer.step()
    lora = {id(parameter) for parameter in experts}
    others = [parameter for parameter in adapter.parameters() if id(parameter) not in lora]
    beside = torch.optim.SGD(others, lr=1e-2)  # whenever it steps
    optimizer.step()
    beside.step()
    assert (adapter.engine.step_count, adapter.skipped_steps) == (1, 0)


def test_what_the_user_has_frozen_is_not_missing() -> None:
    model = models.build()
    adapter = helpers.attach(model, router="trainable")
    for parameter in adapter.router_parameters().values():
        parameter.requires_grad_(False)
    helpers.step(model, torch.optim.AdamW(adapter.lora_parameters()))
    assert adapter.engine.step_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_after_the_optimizer_has_state_is_refused(dtype: torch.dtype) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    helpers.step(model, optimizer)
    model.to(dtype)
    model(**helpers.batch()).loss.backward()
    with pytest.raises(drlora_torch.AttachError, match=f"cast from torch.float32 to {dtype}"):
        optimizer.step()
    if dtype is torch.float64:
        optimizer.load_state_dict(optimizer.state_dict())  # torch casts it
    else:
        optimizer = helpers.adamw(adapter)
    optimizer.step()
    assert (adapter.engine.step_count, adapter.skipped_steps) == (2, 0)
