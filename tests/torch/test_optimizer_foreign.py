"""Optimizers that drlora does not know: what they keep is found, told or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

import drlora_torch
from drlora_torch import AttachError, register_optimizer_state
from drlora_torch.adapter import state_of
from drlora_torch.lora.parts import HeldRows
from drlora_torch.step.optimizers import fresh, meanings
from tests.torch import helpers, models
from tests.torch.test_optimizer_newborn import newborn_rows

PRUNE = {"policy": "prune", "r_init": 6, "r_target": 3, "r_max": 8}


@pytest.fixture(autouse=True)
def _meanings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meanings, "REGISTERED", {})


class Foreign(Optimizer):
    """Gradient descent that is derived from no known optimizer; ``remember`` keeps its state."""

    def __init__(self, parameters: Any, remember: Callable[[Any, Any, Any], None]) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self.remember = remember

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
                    self.remember(self, group, parameter)


class Lookahead(Optimizer):
    """Draws the weights back to slow ones, around an optimizer with hooks of its own."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner
        self.inside: list[torch.Tensor] = []
        """The parameters as the last inner step left them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.inside = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
                parameter.copy_(slow.lerp_(parameter, 0.5))


class Holder:
    def __init__(self, value: torch.Tensor) -> None:
        self.projection = value


def _in_group(optimizer: Any, group: Any, parameter: Any) -> None:
    group.setdefault("state", {})[parameter] = {"exp_avg": torch.zeros_like(parameter)}


def _in_attribute(optimizer: Any, group: Any, parameter: Any) -> None:
    optimizer.__dict__.setdefault("moments", {})[parameter] = torch.zeros_like(parameter)
    optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)


def _keep(**made: Callable[[Any], Any]) -> Callable[[Any, Any, Any], None]:
    def remember(optimizer: Any, group: Any, parameter: Any) -> None:
        for key, make in made.items():
            if key not in optimizer.state[parameter]:
                optimizer.state[parameter][key] = make(parameter.detach())

    return remember


HIDDEN: dict[str, tuple[Callable[[Any, Any, Any], None], str]] = {
    "group": (_in_group, "keeps tensors in 'state' of its parameter groups"),
    "attribute": (_in_attribute, "keeps tensors in its attribute 'moments'"),
    "object": (_keep(projector=Holder), r"'projector' \(Holder\)"),
    "nested": (_keep(parts=lambda p: {"a": [p.clone()]}), r"'parts' \(dict\)"),
}


@pytest.mark.parametrize("place", HIDDEN)
def test_hidden_state_is_refused_at_the_first_step(place: str) -> None:
    remember, message = HIDDEN[place]
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = Foreign(adapter.parameters(), remember)
    with pytest.raises(AttachError, match=message):
        helpers.step(model, optimizer)


@pytest.mark.parametrize(
    ("remember", "told"),
    [
        (lambda *_: None, {}),
        (_keep(projector=Holder), {"projector": "shared"}),
        (_in_group, {"state": "shared"}),
    ],
    ids=["nothing", "object", "group"],
)
def test_hidden_state_can_be_told_to_be_no_matter(remember: Any, told: Any) -> None:
    if told:
        register_optimizer_state(Foreign, **told)
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = Foreign(adapter.parameters(), remember)
    for seed in range(4):
        helpers.step(model, optimizer, seed)
    assert len(adapter.events) == 1


def test_an_optimizer_around_the_one_that_steps_is_checked() -> None:
    """The inner one has closed the step already."""
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = Lookahead(helpers.adamw(adapter))
    with pytest.raises(AttachError, match=r"'slow' .* that tests\.Lookahead keeps"):
        helpers.step(model, optimizer)


def test_an_optimizer_around_the_one_that_steps_is_reset() -> None:
    register_optimizer_state(Lookahead, slow="weights")
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = Lookahead(helpers.adamw(adapter))
    for seed in range(4):
        helpers.step(model, optimizer, seed)
    inside = dict(zip(adapter.parameters(), optimizer.inside, strict=True))
    rows = list(newborn_rows(adapter, adapter.events[0]))
    assert any(parameter[slot].any() for parameter, slot in rows)
    for parameter, slot in rows:
        assert helpers.equal(parameter[slot].detach(), inside[parameter][slot])


@pytest.mark.parametrize("layout", ["pooled", "masked"])
def test_free_slots_stay_zero_though_averages_start_elsewhere(layout: str) -> None:
    class Yogi(Foreign):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step()
            for parameter, state in self.state.items():
                parameter.sub_(state["exp_avg"], alpha=1e-2)

    model = models.build()
    adapter = helpers.attach(model, config=PRUNE, layout=layout)
    ones = _keep(exp_avg=lambda p: torch.full_like(p, 1e-3))
    optimizer = Yogi(adapter.parameters(), ones)
    for seed in range(6):
        helpers.step(model, optimizer, seed)
        for _, _, lora, slots in helpers.projections(adapter):
            free = helpers.free(lora)
            assert not slots.lora_A[free].any()
            assert not slots.lora_B[free].any()
    assert len(adapter.events) == 2


# -- refused at an event -------------------------------------------------------------------------


class Late(AdamW):
    """Begins to keep a state of its own at its third step."""

    make: Callable[[Any], Any] = staticmethod(lambda p: p.detach().clone())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter, state in self.state.items():
            if state["step"] >= 3:
                state.setdefault("late", type(self).make(parameter))


class LateRowMeans(Late):
    make = staticmethod(lambda p: p.detach().mean(1))


class LateNumber(Late):
    make = staticmethod(lambda p: p.detach().sum())


@pytest.mark.parametrize(
    ("cls", "told", "message"),
    [
        (Late, {}, r"register_optimizer_state\(Late, late=...\)"),
        (LateRowMeans, {"late": "weights"}, "'late' is known but its shape does not fit"),
        (LateNumber, {"late": "zeros"}, "'late' is known but its shape does not fit"),
    ],
)
def test_a_refusal_at_an_event_leaves_the_engine_and_the_slots_in_step(
    cls: Any, told: Any, message: str, tmp_path: Path
) -> None:
    if told:
        register_optimizer_state(cls, **told)
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = cls(adapter.parameters(), lr=1e-2)
    for seed in range(3):
        helpers.step(model, optimizer, seed)
    with pytest.raises(AttachError, match=message):
        helpers.step(model, optimizer, 3)
    for name, ranks in adapter.ranks().items():
        assert np.array_equal(adapter.engine.ranks(name), ranks)
    adapter.save_pretrained(tmp_path / "adapter")
    drlora_torch.load(models.build(), tmp_path / "adapter")
    register_optimizer_state(cls, late="shared")
    optimizer.zero_grad()
    for seed in range(3, 7):
        helpers.step(model, optimizer, seed)
    assert [event.step for event in adapter.events] == [4, 6]


# -- what is told --------------------------------------------------------------------------------


def test_all_unknown_keys_are_named_at_once() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = Foreign(adapter.parameters(), _keep(p0=torch.clone, s=torch.zeros_like))
    advice = re.escape("register_optimizer_state(Foreign, p0=..., s=...)")
    with pytest.raises(AttachError, match=advice):
        helpers.step(model, optimizer)


@pytest.mark.parametrize(
    ("optimizer", "told", "message"),
    [
        (Foreign, {}, "takes at least one key"),
        (Foreign, {"p0": "weight"}, "did you mean 'weights'"),
        (Foreign, {"p0": 0}, "p0=0 is no meaning"),
        (nn.Linear, {"p0": "zeros"}, "takes the class of an optimizer"),
        (SGD([nn.Parameter(torch.ones(1))]), {"p0": "zeros"}, r"type\(optimizer\)"),
    ],
    ids=["nothing", "near", "number", "class", "instance"],
)
def test_what_is_told_is_checked(optimizer: Any, told: Any, message: str) -> None:
    with pytest.raises(AttachError, match=message):
        register_optimizer_state(optimizer, **told)
    assert meanings.REGISTERED == {}


def test_classes_of_one_name_are_told_apart() -> None:
    one, other = (type("Same", (SGD,), {"__module__": f"package.{name}"}) for name in "ab")
    register_optimizer_state(one, odd="shared")
    parameter = nn.Parameter(torch.ones(2, 2))
    assert meanings.find_rule(one([parameter]), "odd") is meanings.shared  # type: ignore[arg-type]
    assert meanings.find_rule(other([parameter]), "odd") is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("told", "fresh_row"), [("zeros", 0.0), ("weights", 1.0)])
def test_flat_state_has_rows(told: Any, fresh_row: float) -> None:
    register_optimizer_state(Foreign, flat=told)
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = Foreign([parameter], lambda *_: None)
    optimizer.state[parameter]["flat"] = torch.full((12,), 7.0)
    fresh.clear_state(optimizer, parameter, HeldRows(np.array([1, 3])))
    expected = torch.full((4, 3), 7.0)
    expected[[1, 3]] = fresh_row
    assert torch.equal(optimizer.state[parameter]["flat"], expected.flatten())


def test_the_start_of_weights_that_were_zero_may_be_one_number() -> None:
    """As Prodigy keeps that of B."""
    register_optimizer_state(Foreign, p0="weights", s="zeros")
    model = models.build()
    adapter = helpers.attach(model)

    starts = {id(p): p.detach().clone() for p in adapter.parameters()}

    def remember(optimizer: Any, group: Any, parameter: Any) -> None:
        start, state = starts[id(parameter)], optimizer.state[parameter]
        state.setdefault("p0", start.flatten() if start.any() else start.new_zeros(()))
        state.setdefault("s", torch.zeros_like(start).flatten())

    optimizer = Foreign(adapter.parameters(), remember)
    for seed in range(4):
        helpers.step(model, optimizer, seed)
    assert len(adapter.events) == 1


def test_lbfgs_is_not_advised_to_be_told() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = LBFGS(adapter.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**helpers.batch(0)).loss
        loss.backward()
        return loss

    with pytest.raises(AttachError, match="LBFGS keeps one history of all parameters together"):
        optimizer.step(closure)


# -- several optimizers --------------------------------------------------------------------------


def test_an_event_before_an_optimizer_goes_on_after_a_resume(tmp_path: Path) -> None:
    """Two optimizers, of which the second steps every other time; stop just before an event."""
    runs = []
    for stop in (None, 4):
        model = models.build()
        adapter = helpers.attach(model, auto_step=False, config=PRUNE)
        helpers.fill(adapter)
        both = [AdamW(adapter.parameters()[half::2], lr=1e-2) for half in (0, 1)]
        losses = []
        for seed in range(1, 9):
            if seed == stop:
                adapter.save_pretrained(tmp_path / "adapter")
                states = [each.state_dict() for each in both]
                model = models.build()
                adapter = drlora_torch.load(model, tmp_path / "adapter")
                both = [AdamW(adapter.parameters()[half::2], lr=1e-2) for half in (0, 1)]
                for each, state in zip(both, states, strict=True):
                    each.load_state_dict(state)
            loss = model(**helpers.batch(seed)).loss
            loss.backward()
            for each in both if seed % 2 else both[:1]:
                each.step()
            adapter.step()
            for each in both:
                each.zero_grad()
            losses.append(loss.item())
        assert state_of(adapter).missed == []
        runs.append(losses)
    assert runs[0] == runs[1]
