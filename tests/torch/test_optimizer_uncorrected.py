"""What is said of newborn rows that are not corrected, and a dtype in which they stood still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import schedulefree
import torch
from torch import nn
from torch.optim import SGD, Adam

from drlora_torch.lora.parts import HeldRows
from drlora_torch.step import newborn
from drlora_torch.step.optimizers import fresh
from tests.torch import helpers, models


class Stateless(Adam):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.sign(), alpha=1e-3)


def _schedule_free_wrapper(parameters: Any) -> Any:
    wrapper = schedulefree.ScheduleFreeWrapper(SGD(parameters, lr=1e-2), momentum=0.9)
    wrapper.train()
    return wrapper


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: SGD(p, lr=1e-2, momentum=0.9, dampening=0.9), "with dampening"),
        (lambda p: SGD(p, lr=1e-2, dampening=0.9), None),
        (lambda p: Stateless(p, lr=1e-2), "it keeps no state where Adam does"),
        (_schedule_free_wrapper, "a schedule-free wrapper"),
    ],
    ids=["dampening", "no momentum", "stateless adam", "wrapper"],
)
def test_what_is_not_corrected_is_said(
    make: Any, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = make(adapter.parameters())
    for seed in range(4):
        helpers.step(model, optimizer, seed)
    assert len(adapter.events) == 1
    said = [message for message in caplog.messages if "newborn" in message]
    assert len(said) == (reason is not None)
    assert reason is None or reason in said[0]


@pytest.fixture
def _without_compiler() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("_without_compiler")
def test_steps_smaller_than_the_resolution_of_bfloat16_are_corrected() -> None:
    """They were rounded to the nearest, so rows that torchao rounds at random stood still."""
    import torchao.optim

    torch.manual_seed(0)
    parameter = nn.Parameter(torch.ones(2, 512, dtype=torch.bfloat16))
    optimizer = torchao.optim.AdamW8bit(
        [parameter], lr=1e-4, weight_decay=0.0, bf16_stochastic_round=True
    )
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[parameter]["step"].fill_(1000)
    fresh.clear_state(optimizer, parameter, HeldRows(np.array([1])))
    with torch.no_grad():
        parameter.fill_(1.0)
    layer: Any = type("Layer", (), {"name": "l", "device": parameter.device})
    layer.tensors = lambda: {"l/A": parameter}
    ages = {"l": np.array([newborn.OLD, 0])}
    young = newborn.Young([layer], ages)
    for _ in range(20):
        snapshots = young.snapshot(optimizer)
        optimizer.step()
        young.advance(None, newborn.correct(snapshots, optimizer))
    moved = 1.0 - float(parameter[1].detach().float().mean())
    assert moved == pytest.approx(20 * 1e-4, rel=0.25)
