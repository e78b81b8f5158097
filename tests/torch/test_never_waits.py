"""Between two growth events the host reads nothing from the device, and sends nothing to it.

A step of a model with 16 layers, on a device without data: accumulation, padding, clipping, a loss
scale and newborn rows included. See :mod:`tests.torch.waiting`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from drlora_torch.adapter import state_of
from drlora_torch.lora.kernels import Kernel
from drlora_torch.signals import ProjectionRows
from drlora_torch.step import closing, exchange, newborn, tracker
from drlora_torch.step.forwards import ModelCall
from tests.torch import helpers, models, optimizers
from tests.torch.waiting import DEVICE, NoData, Watch, no_data

__all__ = ["no_data"]
LAYERS, MICRO_BATCHES = 16, 2
CONFIG = {"warmup_steps": 0, "growth_interval": 4, "growth_end": 8}
"""Events after steps 4 and 8."""


class Training:
    """A model in training behind its first event, on a device; batches are padded."""

    def __init__(self, layers: int = LAYERS, **options: Any) -> None:
        self.model = models.build(num_hidden_layers=layers)
        self.model.set_attn_implementation("eager")  # the others look whether a mask masks
        self.adapter = helpers.attach(self.model, config=CONFIG, **options)
        self.optimizer = helpers.adamw(self.adapter, fused=True)
        self.place, self.scaled = "cpu", False
        for _ in range(4):
            self.step()
        assert len(self.adapter.events) == 1
        self.model.to(DEVICE, torch.bfloat16)
        for layer in self.adapter.layers.values():
            layer.lora.kernel = Kernel.GROUPED  # the one for devices
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-2, fused=True)
        self.place, self.scaled = DEVICE, True
        self.step()  # uploads what changes only at events

    def micro_batch(self, seed: int) -> None:
        batch = {key: values.to(self.place) for key, values in helpers.batch(seed).items()}
        mask = torch.ones_like(batch["input_ids"])
        mask[0, :2] = 0
        self.model(**batch, attention_mask=mask).loss.backward()

    def step(self) -> None:
        for seed in range(MICRO_BATCHES):
            self.micro_batch(seed)
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
        optimizer: Any = self.optimizer
        if self.scaled:  # as GradScaler leaves them for a fused optimizer
            optimizer.grad_scale = torch.ones((), device=self.place)
            optimizer.found_inf = torch.zeros((), device=self.place)
        optimizer.step()
        if not self.adapter.options.auto_step:
            self.adapter.step(grad_scale=2.0)
        optimizer.zero_grad()


def ours(watch: Watch) -> list[str]:
    """What this package does; inputs come from the host, and torch has its own ways."""
    return [each for each in watch.found if "other code" not in each]


@pytest.mark.parametrize(
    ("auto_step", "layers"), [pytest.param(True, LAYERS, marks=pytest.mark.slow), (False, 2)]
)
def test_a_step_never_waits(no_data: list[NoData], auto_step: bool, layers: int) -> None:
    training = Training(layers, auto_step=auto_step, router="after_warmup")
    for _ in range(2):
        before = len(no_data)
        with Watch() as watch:
            training.step()
        assert ours(watch) == []
        assert len(no_data) == before + 1, "one copy a step"
        assert [each.asked for each in no_data[-2:]] == [True, False]
    assert training.adapter.engine.pending
    assert training.adapter.engine.step_count == 7
    assert no_data[-1].asked
    young = state_of(training.adapter).ages.values()
    assert {int(age) for each in young for age in each} == {-1, 3}, "newborn rows were corrected"


def largest_gradient(rows: ProjectionRows) -> Tensor:
    return rows.grad_B.abs().amax(dim=1)


largest_gradient.degree = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {"importance": "fisher", "routing": "margin"},
        {"importance": largest_gradient, "routing": torch.square, "auto_step": False},
    ],
)
def test_no_signal_waits(no_data: list[NoData], options: dict[str, Any]) -> None:
    training = Training(2, **options)
    with Watch() as watch:
        training.step()
    assert ours(watch) == []
    assert training.adapter.engine.pending


def test_an_event_waits_for_its_own(no_data: list[NoData], monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(layers=2)
    for _ in range(2):
        training.step()
    carried: list[Any] = []
    monkeypatch.setattr(closing.growth, "carry_out", lambda attached, event: carried.append(event))
    training.step()
    assert [event.step for event in carried] == [8]
    assert no_data[-1].asked
    assert not training.adapter.engine.pending


def test_gradients_that_were_written_to_are_looked_at_by_the_device(no_data: list[NoData]) -> None:
    """Clipping between two micro-batches: were they cleared?"""
    training = Training(layers=2)
    with Watch() as watch:
        training.micro_batch(0)
        torch.nn.utils.clip_grad_norm_(training.adapter.parameters(), 1.0)
        training.micro_batch(1)
    assert ours(watch) == []


WITHOUT_CODES = optimizers.TORCH | optimizers.SCHEDULE_FREE | optimizers.BITS32


@pytest.mark.parametrize("kind", WITHOUT_CODES)
def test_no_correction_of_newborn_rows_waits(kind: str) -> None:
    """Around the step of each optimizer, which may itself wait."""
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = WITHOUT_CODES[kind]([parameter])
    parameter.grad = torch.ones(4, 6)
    optimizer.step()
    elsewhere = torch.nn.Parameter(parameter.to(DEVICE))
    elsewhere.grad = torch.ones(4, 6, device=DEVICE)
    optimizer.param_groups[0]["params"][:] = [elsewhere]
    optimizer.state[elsewhere] = {
        key: value.to(DEVICE) if isinstance(value, Tensor) and value.dim() else value
        for key, value in optimizer.state.pop(parameter, {}).items()
    }
    layer: Any = type("Layer", (), {"name": "l", "device": elsewhere.device})
    layer.tensors = lambda: {"l/A": elsewhere}
    young = newborn.Young([layer], {"l": np.array([-1, 3, -1, 0])})
    skipped = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for watched in (False, True):  # the first uploads the rows
        with Watch() as watch:
            snapshots = young.snapshot(optimizer)
            young.advance(skipped, newborn.correct(snapshots, optimizer, skipped))
        assert not watched or watch.found == []


def test_a_mask_of_some_of_the_tokens_is_chosen_by_the_device() -> None:
    """A layer of a vision model that receives the tokens of one kind."""
    mask, kinds = (torch.ones(2, 4, dtype=torch.int64, device=DEVICE) for _ in range(2))
    call = ModelCall(mask=mask, length=4, kinds=kinds)
    with Watch() as watch:
        found = call.token_mask(6)
    assert found is not None
    assert [tuple(each.shape) for each in found if each is not None] == [(6,), ()]
    assert watch.found == []


def test_the_host_is_told_whether_a_mask_fits_with_the_statistics(
    no_data: list[NoData], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(layers=2)
    aligned = torch.ones((), dtype=torch.bool, device=DEVICE)
    mask = torch.ones(21, dtype=torch.bool, device=DEVICE)
    monkeypatch.setattr(ModelCall, "token_mask", lambda self, num_tokens: (mask, aligned))
    with Watch() as watch:
        training.step()
    assert ours(watch) == []
    assert no_data[-1].size == no_data[-2].size + 2 * MICRO_BATCHES


GPU_CONFIG = {"warmup_steps": 1, "growth_interval": 4, "growth_end": 9}
"""Events after steps 5 and 9."""


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["fused", "foreach", "capturable"])
@pytest.mark.parametrize("auto_step", [True, False])
def test_a_step_on_a_gpu_never_waits(optimizer: str, auto_step: bool) -> None:
    """Between the events, torch knows of no place in this package that waits; models have some."""
    model = models.build(dtype=torch.bfloat16, num_hidden_layers=LAYERS).cuda()
    model.set_attn_implementation("eager")
    adapter = helpers.attach(model, config=GPU_CONFIG, auto_step=auto_step, router="after_warmup")
    adam = helpers.adamw(adapter, **{optimizer: True})
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=optimizer == "fused")
    batches = [
        {name: each.cuda() for name, each in helpers.batch(seed).items()}
        for seed in range(MICRO_BATCHES)
    ]
    mask = torch.ones_like(batches[0]["input_ids"])
    mask[0, :2] = 0
    masks = (mask, None)

    def step() -> None:
        for batch, given in zip(batches, masks, strict=True):
            scaler.scale(model(**batch, attention_mask=given).loss).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        scaler.step(adam)
        scaler.update()
        if not auto_step:
            adapter.step(grad_scale=1024.0)
        adam.zero_grad()

    for number in range(1, 9):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
            torch.cuda.set_sync_debug_mode("default")
        waits = [each for each in caught if "synchroniz" in str(each.message)]
        ours = [f"{each.filename}:{each.lineno}" for each in waits if "drlora" in each.filename]
        if number in (3, 4, 7, 8):  # neither an event nor the first step after one
            assert ours == []
        assert adapter.engine.pending == (number not in (1, 5))
    assert len(adapter.events) == 1
    assert adapter.engine.step_count == 8
    assert adapter.skipped_steps == 0
    step()
    assert len(adapter.events) == 2
    assert not adapter.engine.pending


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "reads": lambda values: values.sum().item(),
    "asks": lambda values: bool(values.any()),
    "lists": lambda values: values.tolist(),
    "counts": lambda values: values[values > 0],
    "copies": lambda values: values.to("cpu"),
    "uploads": lambda values: torch.zeros(3).to(values.device),
    "uploads a number": lambda values: torch.tensor(3.0, device=values.device),
}
PLACES: dict[str, tuple[Any, str]] = {
    "routing": (tracker, "sum_weights"),
    "importance": (tracker, "slot_importance"),
    "newborn": (tracker.newborn, "count_steps"),
    "exchange": (exchange.agreement, "probe"),
}


@pytest.mark.slow
def test_what_waits_is_noticed(no_data: list[NoData]) -> None:
    """The tests above can fail, wherever something waits."""
    training = Training(layers=2)
    for name, fault in FAULTS.items():
        for place, (owner, function) in PLACES.items():
            with pytest.MonkeyPatch.context() as monkeypatch, Watch() as watch:
                monkeypatch.setattr(owner, function, _broken(getattr(owner, function), fault))
                try:
                    training.step()
                except (RuntimeError, NotImplementedError):
                    training.optimizer.zero_grad()
                    continue  # there are no values to read
            assert watch.found != [], (name, place)


def _broken(inner: Callable[..., Any], fault: Callable[[Tensor], object]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        fault(next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result

    return run
