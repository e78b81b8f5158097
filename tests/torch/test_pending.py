"""Saved between the micro-batches of an accumulation, a run goes on as if it had not stopped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.amp import GradScaler

import drlora_torch
from drlora_torch.adapter import state_of
from drlora_torch.lifecycle.residents import active_tracker
from drlora_torch.storage import checkpoint
from tests.marks import slow_and_thinned
from tests.torch import helpers, models
from tests.torch.test_checkpoint import FILE, LAYER, ROUTER, _at, _put, refused, rewrite

STEPS, MICRO_BATCHES = 6, 3


def micro_batch(model: Any, number: int, scaler: GradScaler | None = None) -> float:
    loss = model(**helpers.batch(number)).loss / MICRO_BATCHES
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.item()


def go_on(
    adapter: drlora_torch.Adapter, optimizer: Any, begin: int, keep: Callable[[int], None]
) -> list[float]:
    """Train from a micro-batch to the end, keeping the state before each."""
    losses = []
    for number in range(begin, STEPS * MICRO_BATCHES):
        keep(number)
        losses.append(micro_batch(adapter.model, number))
        if (number + 1) % MICRO_BATCHES == 0:
            optimizer.step()
            if not adapter.options.auto_step:
                adapter.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    "options",
    slow_and_thinned(
        [
            ({"router": "after_warmup"},),
            ({"auto_step": False, "router": "trainable"},),
            ({"layout": "masked", "config": {"policy": "prune", "r_init": 6}},),
        ]
    ),
    ids=["growth", "by hand", "prune"],
)
def test_resume_at_any_micro_batch(tmp_path: Path, options: dict[str, Any]) -> None:
    def keep(number: int) -> None:
        adapter.save_pretrained(tmp_path / str(number))
        torch.save(optimizer.state_dict(), tmp_path / f"{number}.pt")

    adapter = helpers.attach(models.build(), **options)
    optimizer = helpers.adamw(adapter, weight_decay=0.1)
    losses = go_on(adapter, optimizer, 0, keep)
    adapter.save_pretrained(tmp_path / "straight")
    wanted = load_file(tmp_path / "straight" / FILE)
    for stop in range(STEPS * MICRO_BATCHES):
        if stop % MICRO_BATCHES == 0:
            continue  # between steps: test_resume_at_any_step
        resumed = drlora_torch.load(models.build(), tmp_path / str(stop))
        its_optimizer = helpers.adamw(resumed, weight_decay=0.1)
        its_optimizer.load_state_dict(torch.load(tmp_path / f"{stop}.pt"))
        assert go_on(resumed, its_optimizer, stop, lambda _: None) == losses[stop:]
        resumed.save_pretrained(tmp_path / "resumed")
        found = load_file(tmp_path / "resumed" / FILE)
        assert found.keys() == wanted.keys()
        assert all(helpers.equal(found[key], wanted[key]) for key in wanted)
    assert len(adapter.events) > 1


def held(adapter: drlora_torch.Adapter, folder: Path) -> dict[str, Tensor]:
    """What is pending in the file of an adapter."""
    adapter.save_pretrained(folder)
    return {k: v for k, v in load_file(folder / FILE).items() if k.startswith("pending/")}


def test_what_is_pending(tmp_path: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model, router="after_warmup")
    optimizer = helpers.adamw(adapter)
    for number in range(2):
        micro_batch(model, number)
    found = held(adapter, tmp_path)
    lora = [key for layer in adapter.layers.values() for key in layer.lora.tensors()]
    assert set(found) == {
        *(f"pending/gradient/{key}" for key in lora),  # the routers are frozen until later
        *(f"pending/routing/{name}" for name in adapter.layers),
    }
    assert all(totals[-1] == 2 * 21 for key, totals in found.items() if "routing" in key)
    optimizer.step()
    assert held(adapter, tmp_path) == {}  # though the gradients are still there
    optimizer.zero_grad()
    assert held(adapter, tmp_path) == {}


def test_nothing_is_pending_of_a_step_that_does_not_count(tmp_path: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    micro_batch(model, 0)
    optimizer.zero_grad()  # given up
    assert held(adapter, tmp_path) == {}
    micro_batch(model, 1)
    with adapter.paused():
        optimizer.step()
    assert held(adapter, tmp_path) == {}
    optimizer.zero_grad()
    spy = helpers.Spy(adapter)
    helpers.step(model, optimizer)
    assert {tokens for _, _, tokens in spy.samples[0].values()} == {21}


def test_saved_before_a_step_is_closed_by_hand(tmp_path: Path) -> None:
    """The optimizer has stepped and its gradients are gone: importance and routing remain."""
    adapter = helpers.attach(models.build(), auto_step=False)
    optimizer = helpers.adamw(adapter)
    helpers.step(adapter.model, optimizer)
    adapter.step()  # of no importance yet: B was 0
    helpers.step(adapter.model, optimizer, 1)
    adapter.save_pretrained(tmp_path)
    resumed = drlora_torch.load(models.build(), tmp_path)
    for each in (adapter, resumed):
        each.step()
    for name in adapter.layers:
        assert adapter.engine.rank_importance(name).any()
        for read in ("rank_importance", "routing_frequency"):
            have, want = getattr(resumed.engine, read)(name), getattr(adapter.engine, read)(name)
            assert have.tolist() == want.tolist()


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    adapter = helpers.attach(models.build(), router="trainable")
    micro_batch(adapter.model, 0)
    adapter.save_pretrained(tmp_path)
    return tmp_path


def test_use_only_ignores_it(unfinished: Path) -> None:
    adapter = drlora_torch.load(models.build(), unfinished, trainable=False)
    assert all(parameter.grad is None for parameter in adapter.model.parameters())
    assert helpers.pending(adapter) == {}


def test_restore_replaces_what_was_begun(unfinished: Path, tmp_path: Path) -> None:
    adapter = helpers.attach(models.build(), router="trainable")
    adapter.save_pretrained(tmp_path / "fresh")
    for number in range(1, 3):
        micro_batch(adapter.model, number)
    adapter.restore(unfinished)
    micro_batch(adapter.model, 1)
    have = held(adapter, tmp_path / "restored")
    straight = drlora_torch.load(models.build(), unfinished)
    micro_batch(straight.model, 1)
    want = held(straight, tmp_path / "straight")
    assert have.keys() == want.keys()
    assert all(helpers.equal(have[key], want[key]) for key in want)
    adapter.restore(tmp_path / "fresh")
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert held(adapter, tmp_path / "restored") == {}


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_overflow_comes_back(tmp_path: Path, value: float) -> None:
    """Gradients are saved as they are: the scaler skips the step as if the run had not stopped."""
    scaler = GradScaler("cpu", init_scale=1024.0)
    adapter = helpers.attach(models.build())
    micro_batch(adapter.model, 0, scaler)
    adapter.parameters()[0].grad[0, 0] = value
    adapter.save_pretrained(tmp_path)
    resumed = drlora_torch.load(models.build(), tmp_path)
    optimizer = helpers.adamw(resumed)
    micro_batch(resumed.model, 1, scaler)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert scaler.get_scale() == 512.0
    assert resumed.engine.step_count == resumed.skipped_steps == 0
    micro_batch(resumed.model, 2, scaler)
    scaler.step(optimizer)
    assert resumed.engine.step_count == 1
    assert resumed.skipped_steps == 0


def test_several_processes_leave_it_out(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = drlora_torch.load(models.build(), unfinished)
    monkeypatch.setattr(checkpoint, "several_processes", lambda group: True)
    with pytest.warns(RuntimeWarning, match="from the beginning of the step"):
        adapter.save_pretrained(unfinished)
    assert not any(key.startswith("pending/") for key in load_file(unfinished / FILE))
    active_tracker(state_of(adapter)).forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.save_pretrained(unfinished)


LORA = f"{LAYER}/down_proj/lora_A"
TOTALS, GRADIENT = f"pending/routing/{LAYER}", f"pending/gradient/{LORA}"
DAMAGED: list[tuple[Callable[..., None], str]] = [
    (_put(TOTALS, lambda t: t[:-1]), "has shape"),
    (_put(TOTALS, _at(0, -1.0)), "counts that are impossible"),
    (_put(TOTALS, _at(-1, 0.5)), "counts that are impossible"),
    (_put(TOTALS, _at(-1, float("inf"))), "counts that are impossible"),
    (_put(GRADIENT, lambda t: t[1:]), "has shape"),
    (_put(GRADIENT, lambda t: t.long()), "wrong dtype"),
    (_put(f"pending/gradient/{ROUTER}", lambda t: t[1:]), "has shape"),
    (lambda held: held.update({"pending/more": torch.zeros(1)}), "has an unknown tensor"),
    (lambda held: held.update({f"{GRADIENT}2": torch.zeros(1)}), "has an unknown tensor"),
    (
        lambda held: held.update({f"pending/importance/{LORA}": torch.zeros(32)}),
        "has an unknown tensor",
    ),
]


@pytest.mark.parametrize(("change", "match"), DAMAGED, ids=[str(i) for i in range(len(DAMAGED))])
def test_damage(unfinished: Path, change: Callable[..., None], match: str) -> None:
    rewrite(unfinished, tensors=change)
    refused(unfinished, match)
