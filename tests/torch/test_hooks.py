"""The hooks that torch calls for every optimizer: ours come and go with their adapters."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from tests.marks import slow_but
from tests.torch import helpers, models


def live_hooks() -> int:
    return len(torch_optimizer._global_optimizer_pre_hooks) + len(
        torch_optimizer._global_optimizer_post_hooks
    )


@pytest.mark.parametrize("auto_step", slow_but([True, False], [True]))
def test_garbage_collected_model_leaves_no_hook(auto_step: bool) -> None:
    gc.collect()
    helpers.attach(models.build()).detach()
    before = live_hooks()
    model = models.build()
    adapter = helpers.attach(model, auto_step=auto_step)
    optimizer = helpers.adamw(adapter)
    helpers.step(model, optimizer)
    assert live_hooks() == before + 2
    gone = weakref.ref(model)
    del model, adapter, optimizer
    gc.collect()
    assert gone() is None
    helpers.attach(models.build()).detach()  # the next adapter sweeps
    assert live_hooks() == before


def test_a_model_may_be_collected_in_the_middle_of_an_optimizer_step() -> None:
    """torch goes through its global hooks then, and they must not change under it."""
    dropped: list[Any] = []

    def collect(*_: Any) -> None:
        dropped.clear()
        gc.collect()

    handle = torch_optimizer.register_optimizer_step_pre_hook(collect)
    dropped.append(helpers.attach(models.build()))  # its hooks come after `collect`
    gone = weakref.ref(dropped[0].model)
    parameter = torch.nn.Parameter(torch.ones(2))
    other = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    try:
        other.step()
    finally:
        handle.remove()
    assert gone() is None
    assert parameter.tolist() == pytest.approx([0.9, 0.9])


def test_detach_leaves_no_hook() -> None:
    helpers.attach(models.build()).detach()
    before = live_hooks()
    model = models.build()
    helpers.attach(model).detach()
    assert live_hooks() == before
