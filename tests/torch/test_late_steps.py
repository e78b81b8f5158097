"""Statistics that arrive late lead to the decisions of those that arrive at once, step by step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Adafactor

import drlora_torch
from drlora_torch.adapter import state_of
from drlora_torch.step import newborn
from drlora_torch.step.exchange import Sent, Statistics
from drlora_torch.step.optimizers import adam
from drlora_torch.step.optimizers.correction import Snapshot
from tests.marks import slow_but
from tests.torch import helpers, models, optimizers
from tests.torch.helpers import Spy
from tests.torch.waiting import arrive_late

STEPS = 11
CONFIG = {"growth_interval": 3, "growth_end": 8}
"""Events after steps 5 and 8; the warmup ends with step 2."""


class Run:
    """A run of ``STEPS`` steps, and all that it decided."""

    def __init__(self, late: bool, folder: Path, **options: Any) -> None:
        self.late, self.folder = late, folder
        self.model = models.build()
        config = CONFIG | options.pop("config", {})
        self.adapter = helpers.attach(self.model, config=config, **options)
        self.optimizers = [helpers.adamw(self.adapter)]
        self.spies = [Spy(self.adapter)]
        self.losses: list[float] = []
        self.pending: list[bool] = []
        """Whether a step was on its way after each step."""

    def step(self, seed: int, *, poison: float | None = None) -> None:
        loss = self.model(**helpers.batch(seed)).loss
        loss.backward()
        self.losses.append(loss.item())
        if poison is not None:
            self.adapter.lora_parameters()[0].grad[0, 0] = poison
        self.update()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        if not self.adapter.options.auto_step:
            self.adapter.step()
        self.pending.append(self.adapter.engine.pending)
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def result(self) -> dict[str, Any]:
        """Everything, in values that can be compared; asks the engine only now."""
        state = self.adapter.engine.state_dict()
        return {
            "losses": self.losses,
            "samples": [
                {name: (phi.tolist(), s.tolist(), n) for name, (phi, s, n) in sample.items()}
                for spy in self.spies
                for sample in spy.samples
            ],
            "events": [(event.step, _plain(event.deltas)) for event in self.adapter.events],
            "layers": _plain(state["layers"]),
            "steps": self.adapter.engine.step_count,
            "skipped": self.adapter.skipped_steps,
            "ages": _plain(state_of(self.adapter).ages),
            "parameters": [p.detach().tolist() for p in self.adapter.parameters()],
        }


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return values.tolist() if isinstance(values, np.ndarray) else values


def plain(run: Run) -> None:
    for seed in range(STEPS):
        run.step(seed)


def accumulate(run: Run) -> None:
    """Four micro-batches, gradients clipped between them."""
    for seed in range(STEPS):
        for part in range(4):
            run.model(**helpers.batch(4 * seed + part)).loss.backward()
            torch.nn.utils.clip_grad_norm_(run.adapter.parameters(), 0.5)
        run.update()


def drop_batches(run: Run) -> None:
    """Some batches are given up after their backward pass, in both ways."""
    for seed in range(STEPS):
        if seed % 3:
            run.model(**helpers.batch(100 + seed)).loss.backward()
            run.optimizers[0].zero_grad(set_to_none=seed % 2 == 0)
        run.step(seed)


def not_finite(run: Run) -> None:
    for seed in range(STEPS):
        run.step(seed, poison=torch.nan if seed in (2, 3, 6) else None)
        with torch.no_grad():
            for parameter in run.adapter.parameters():
                parameter.nan_to_num_(0.0)


def overflow(run: Run) -> None:
    """A fused optimizer skips the first step, one before the first event, and one after it."""
    run.optimizers = [helpers.adamw(run.adapter, fused=True)]
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for seed in range(STEPS + 3):
        loss = run.model(**helpers.batch(seed)).loss
        scaler.scale(loss).backward()
        run.losses.append(loss.item())
        if seed in (0, 3, 9):
            run.adapter.lora_parameters()[0].grad[0, 0] = torch.inf
        scaler.step(run.optimizers[0])
        scaler.update()
        run.pending.append(run.adapter.engine.pending)
        run.optimizers[0].zero_grad()


def two_optimizers(run: Run) -> None:
    """One of them made late, and with other betas."""
    own = run.adapter.lora_parameters()
    run.optimizers = [torch.optim.AdamW(own[::2], lr=1e-2)]
    for seed in range(STEPS):
        if seed == 6:
            run.optimizers.append(torch.optim.Adam(own[1::2], lr=1e-2, betas=(0.5, 0.7)))
        run.step(seed)


def schedule_free(run: Run) -> None:
    run.optimizers = [optimizers.ALL["schedulefree adamw"](run.adapter.parameters())]
    plain(run)


def grow_up(run: Run) -> None:
    """Newborn rows need no correction after three steps."""
    run.optimizers = [helpers.adamw(run.adapter, betas=(0.05, 0.1))]
    plain(run)


def grow_up_8bit(run: Run) -> None:
    """Their steps are limited until then."""
    run.optimizers = [
        bitsandbytes.optim.AdamW8bit(run.adapter.parameters(), lr=1e-2, betas=(0.05, 0.1))
    ]
    plain(run)


def grow_up_adafactor(run: Run) -> None:
    run.optimizers = [Adafactor(run.adapter.parameters(), lr=1e-2, beta2_decay=-5.0)]
    plain(run)


def pause(run: Run) -> None:
    for seed in range(STEPS + 3):
        if seed in (3, 6, 7):
            with run.adapter.paused():
                run.step(seed)
        else:
            run.step(seed)


def stop_and_resume(run: Run) -> None:
    """Saved with a step on its way, twice."""
    for seed in range(STEPS):
        run.step(seed)
        if seed in (2, 5):
            if run.late:
                assert run.adapter.engine.pending
            run.adapter.save_pretrained(run.folder / "adapter")
            state = run.optimizers[0].state_dict()
            run.model = models.build()
            run.adapter = drlora_torch.load(run.model, run.folder / "adapter")
            run.optimizers = [helpers.adamw(run.adapter)]
            run.optimizers[0].load_state_dict(state)
            run.spies.append(Spy(run.adapter))


def ask(run: Run) -> None:
    """Someone looks at the engine all the time, also in the middle of a step."""
    for seed in range(STEPS):
        loss = run.model(**helpers.batch(seed)).loss
        assert run.adapter.engine.step_count == seed
        loss.backward()
        run.update()
        assert len(run.adapter.engine.saliency(next(iter(run.adapter.layers)))) == models.EXPERTS


FAST = ("not finite", "pruned", "resumed")
SCENARIOS: dict[str, tuple[Callable[[Run], None], dict[str, Any]]] = {
    "plain": (plain, {}),
    "masked": (plain, {"layout": "masked"}),
    "accumulation": (accumulate, {}),
    "accumulation by hand": (accumulate, {"auto_step": False}),
    "dropped batches": (drop_batches, {}),
    "dropped batches by hand": (drop_batches, {"auto_step": False}),
    "not finite": (not_finite, {}),
    "overflow": (overflow, {}),
    "by hand": (plain, {"auto_step": False}),
    "two optimizers": (two_optimizers, {"auto_step": False}),
    "schedule free": (schedule_free, {}),
    "grown up": (grow_up, {}),
    "grown up, 8 bits": (grow_up_8bit, {"config": {"r_init": 8, "r_target": 16, "r_max": 32}}),
    "grown up, Adafactor": (grow_up_adafactor, {}),
    "routers after warmup": (plain, {"router": "after_warmup"}),
    "pruned": (plain, {"config": {"policy": "prune", "r_init": 6}}),
    "global": (plain, {"config": {"scope": "global"}}),
    "paused": (pause, {}),
    "resumed": (stop_and_resume, {}),
    "asked": (ask, {}),
}


@pytest.mark.parametrize("name", slow_but(SCENARIOS, FAST))
@pytest.mark.filterwarnings("ignore:step .*routing or importance is not finite:RuntimeWarning")
def test_late_statistics_decide_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario, options = SCENARIOS[name]
    at_once = Run(False, tmp_path, **options)
    scenario(at_once)
    assert not any(at_once.pending)
    arrive_late(monkeypatch)
    late = Run(True, tmp_path, **options)
    scenario(late)
    assert sum(late.pending) >= len(late.pending) // 2, "most steps were on their way"
    expected, found = at_once.result(), late.result()
    for key in expected:
        assert found[key] == expected[key], key


def move_in_skipped_steps(kept: Snapshot, moved: Tensor, skipped: Tensor | None) -> None:
    write_rows(kept, moved, None)


def advance_in_skipped_steps(self: newborn.Young, idle: Tensor | None, horizon: float) -> None:
    advance(self, None, horizon)


def correct_until_told(self: newborn.Young, idle: Tensor | None, horizon: float) -> None:
    advance(self, idle, math.inf)


def count_skipped_steps(self: Sent) -> Statistics:
    return dataclasses.replace(arrive(self), idle=False)


write_rows, advance, arrive = adam.write_rows, newborn.Young.advance, Sent.arrive


@pytest.mark.parametrize(
    ("owner", "name", "broken", "scenario"),
    [
        (adam, "write_rows", move_in_skipped_steps, "overflow"),
        (newborn.Young, "advance", advance_in_skipped_steps, "overflow"),
        (newborn.Young, "advance", correct_until_told, "grown up"),
        (Sent, "arrive", count_skipped_steps, "overflow"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # a missing guard may well warn on its way
def test_a_missing_guard_is_noticed(
    owner: Any, name: str, broken: Any, scenario: str, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(owner, name, broken)
        with pytest.raises(AssertionError):
            test_late_statistics_decide_the_same(scenario, tmp_path, monkeypatch)
