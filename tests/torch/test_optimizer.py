"""The user's optimizer: followed by itself, cleared where slots change, corrected for newborns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

import drlora_torch
from drlora_torch.adapter import state_of
from drlora_torch.step.newborn import adam_ratio
from tests.torch import helpers, models

PRUNE = {"policy": "prune", "r_init": 6}


def _hf_adafactor(parameters: Any) -> Optimizer:
    return transformers.Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=False)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda p: Adam(p, lr=1e-2),
    "adam amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "adamw foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "sgd momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: Adafactor(p, lr=1e-2),
    "transformers adafactor": _hf_adafactor,
}


def row_state(optimizer: Optimizer, parameter: Any) -> dict[str, torch.Tensor]:
    """State that belongs to rows of a parameter; a factor of its columns may have as many."""
    return {
        key: value
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
        and value.dim()
        and value.shape[0] == parameter.shape[0]
        and "col" not in key
    }


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_of_changed_slots_is_zeroed(kind: str) -> None:
    model = models.build()
    adapter = helpers.attach(model, config=PRUNE, auto_step=False)
    optimizer = OPTIMIZERS[kind](adapter.parameters())
    freed = 0
    for seed in range(6):
        helpers.step(model, optimizer, seed)
        held = {name: layer.lora.table.owner != -1 for name, layer in adapter.layers.items()}
        before = {
            (parameter, key): value.clone()
            for parameter in adapter.parameters()
            for key, value in row_state(optimizer, parameter).items()
        }
        adapter.step()
        for name, _, lora, slots in helpers.projections(adapter):
            cut = held[name] & (lora.table.owner == -1)
            freed += int(cut.sum())
            for parameter in (slots.lora_A, slots.lora_B):
                state = row_state(optimizer, parameter)
                assert state
                for key, value in state.items():
                    old = before[parameter, key]
                    assert bool(old[cut].any()) == bool(cut.any())
                    assert not value[cut].any()
                    assert helpers.equal(value[~cut], old[~cut])
    assert freed == 2 * 2 * models.EXPERTS * 2


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_free_slots_stay_zero_after_pruning(kind: str) -> None:
    model = models.build()
    adapter = helpers.attach(model, config=PRUNE)
    optimizer = OPTIMIZERS[kind](adapter.parameters())
    for seed in range(8):
        helpers.step(model, optimizer, seed)
    for _, _, lora, slots in helpers.projections(adapter):
        assert len(helpers.free(lora)) == 2 * models.EXPERTS
        assert not slots.lora_A[helpers.free(lora)].any()
        assert not slots.lora_B[helpers.free(lora)].any()


class Shadow:
    """Follows one row with an optimizer of its own that began at the row's birth."""

    def __init__(self, row: torch.Tensor, make: Callable[..., Optimizer]) -> None:
        self.row = torch.nn.Parameter(row.detach().clone())
        self.optimizer = make([self.row])

    def step(self, gradient: torch.Tensor) -> None:
        self.row.grad = gradient
        self.optimizer.step()


def newborn_rows(adapter: Any, event: Any) -> Iterator[tuple[Any, int]]:
    """Iterate over (parameter, slot) of the dimensions an event made."""
    for name, _, lora, slots in helpers.projections(adapter):
        for expert in range(lora.table.num_experts):
            rank = int(event.ranks[name][expert])
            for slot in helpers.owned(lora, expert)[rank - int(event.deltas[name][expert]) : rank]:
                yield slots.lora_A, slot
                yield slots.lora_B, slot


def follow_newborns(make: Callable[..., Optimizer], steps: int, **options: Any) -> float:
    """Train; the largest deviation of newborn rows from shadows that began at their birth."""
    model = models.build(dtype=torch.float64)
    adapter = helpers.attach(model, **options)
    optimizer = make(adapter.parameters())
    shadows: dict[tuple[Any, int], Shadow] = {}
    gradients: dict[Any, torch.Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({p: p.grad.clone() for p in adapter.parameters()})
    )
    worst, moved = 0.0, 0.0
    for seed in range(steps):
        born_before = len(adapter.events)
        helpers.step(model, optimizer, seed)
        for (parameter, slot), shadow in shadows.items():
            before = shadow.row.detach().clone()
            shadow.step(gradients[parameter][slot])
            worst = max(worst, float((parameter[slot] - shadow.row).detach().abs().max()))
            moved = max(moved, float((before - shadow.row).detach().abs().max()))
        if len(adapter.events) > born_before:
            for parameter, slot in newborn_rows(adapter, adapter.events[-1]):
                shadows[parameter, slot] = Shadow(parameter[slot], make)
    assert moved > 1e-3
    return worst


def _adam(cls: type[Adam], **options: Any) -> Callable[..., Optimizer]:
    return lambda p: cls(p, **{"lr": 1e-2, "eps": 1e-30, **options})


@pytest.mark.parametrize("layout", ["pooled", "masked"])
@pytest.mark.parametrize(
    "make",
    [
        _adam(AdamW, weight_decay=0.0),
        _adam(AdamW, weight_decay=0.0, fused=True),
        _adam(Adam, foreach=True, betas=(0.8, 0.95)),
        _adam(Adam, betas=(0.0, 0.9)),
        _adam(AdamW, weight_decay=2.0),
        _adam(Adam, weight_decay=2.0),
        _adam(AdamW, amsgrad=True, lr=torch.tensor(1e-2, dtype=torch.float64)),
    ],
    ids=["adamw", "fused", "foreach", "no momentum", "decay", "l2", "amsgrad"],
)
def test_newborn_rows_move_as_if_their_count_had_just_begun(
    make: Callable[..., Optimizer], layout: str
) -> None:
    assert follow_newborns(make, 12, layout=layout) < 1e-12


def test_plain_newborn_rows_move_too_far() -> None:
    """The reason for the correction: without it the first updates are several times too big."""
    make = _adam(AdamW, weight_decay=0.0)
    assert follow_newborns(make, 12, newborn="plain") > 1e-2


def test_plain_leaves_the_optimizer_alone() -> None:
    """Bit for bit what AdamW does to the same gradients, newborn rows included."""
    model = models.build()
    adapter = helpers.attach(model, newborn="plain")
    optimizer = helpers.adamw(adapter, weight_decay=0.1)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in adapter.parameters()]
    untouched = AdamW(copies, lr=1e-2, weight_decay=0.1)

    def take_gradients(*_: Any) -> None:
        for parameter, copied in zip(adapter.parameters(), copies, strict=True):
            copied.grad = parameter.grad.clone()

    optimizer.register_step_pre_hook(take_gradients)
    for seed in range(9):
        events = len(adapter.events)
        helpers.step(model, optimizer, seed)
        untouched.step()
        pairs = dict(zip(adapter.parameters(), copies, strict=True))
        if len(adapter.events) > events:
            for parameter, slot in newborn_rows(adapter, adapter.events[-1]):
                with torch.no_grad():
                    pairs[parameter][slot] = parameter[slot]
        assert all(helpers.equal(p.detach(), c.detach()) for p, c in pairs.items())
    assert len(adapter.events) == 2


def test_correction_ends_when_it_no_longer_matters() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter, betas=(0.5, 0.7))
    for seed in range(5):
        helpers.step(model, optimizer, seed)
    ages = state_of(adapter).ages.values()
    assert sorted({int(age) for each in ages for age in each}) == [-1, 1]
    for seed in range(19):  # 0.7^19 = 0.0011 is the last above a thousandth
        helpers.step(model, optimizer, seed)
    assert {int(age) for each in ages for age in each} == {-1, 18}
    helpers.step(model, optimizer)
    helpers.step(model, optimizer)
    assert {int(age) for each in ages for age in each} == {-1}
    assert abs(adam_ratio(np.array([20]), 24.0, (0.5, 0.7))[0] - 1) < 1e-3


def test_new_optimizer_after_the_birth_is_not_corrected_twice() -> None:
    """Its own step count is younger than the rows, so its steps are already right."""
    results = []
    for newborn in ("corrected", "plain"):
        model = models.build()
        adapter = helpers.attach(model, newborn=newborn, config={"growth_end": 4})
        first = SGD(adapter.parameters(), lr=1e-2)
        for seed in range(4):
            helpers.step(model, first, seed)
        assert len(adapter.events) == 1
        second = helpers.adamw(adapter)
        helpers.step(model, second)
        helpers.step(model, second)
        results.append([p.detach().clone() for p in adapter.parameters()])
    assert all(helpers.equal(a, b) for a, b in zip(*results, strict=True))


def test_paused_steps_are_still_corrected() -> None:
    """A pause stops the counting, not the care for newborn rows."""
    results = []
    for pause in (False, True):
        model = models.build()
        adapter = helpers.attach(model, config={"growth_end": 4})
        optimizer = helpers.adamw(adapter)
        for seed in range(4):
            helpers.step(model, optimizer, seed)
        for seed in range(3):
            if pause:
                with adapter.paused():
                    helpers.step(model, optimizer, seed)
            else:
                helpers.step(model, optimizer, seed)
        assert adapter.engine.step_count == (4 if pause else 7)
        results.append([p.detach().clone() for p in adapter.parameters()])
    assert all(helpers.equal(a, b) for a, b in zip(*results, strict=True))


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
