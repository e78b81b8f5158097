"""What the engine tells others: the names of policies, and samples to a recorder."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_core.policies import greedy, policy_name


class Nothing:
    """A policy that is an object, and grows nothing."""

    def __call__(self, request: Any) -> Any:
        return np.zeros_like(request.limits)


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (greedy, "greedy"),
        (functools.partial(greedy), "greedy"),
        (Nothing(), "Nothing"),
        (functools.partial(Nothing()), "Nothing"),
    ],
)
def test_a_policy_has_the_name_of_its_function_or_class(policy: Any, name: str) -> None:
    assert policy_name(policy) == name


class Notes:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.samples: list[Any] = []
        self.steps: list[Any] = []

    def sample(self, name: str, routing: Any, importance: Any, tokens: int | None) -> None:
        self.samples.append((name, routing, importance, tokens))

    def step(self, step: int, ranks: Any, event: Any) -> None:
        self.steps.append((step, {name: of.tolist() for name, of in ranks.items()}, event))

    def close(self) -> None:
        self.steps.append("closed")


@pytest.mark.parametrize("together", [False, True])
def test_a_recorder_is_told_every_sample_and_step(together: bool) -> None:
    engine, notes = AllocatorEngine(AllocatorConfig()), Notes()
    for name in ("a", "b"):
        engine.add_layer(name, 2)
    engine.record_to(notes)
    given = {name: np.array([0.25, 0.75]) for name in ("a", "b")}
    values = {name: np.ones((2, engine.config.r_max)) for name in ("a", "b")}
    tokens = {"a": 5, "b": 6}
    if together:
        engine.observe_all(routing=given, importance=values, tokens=tokens)
    else:
        for name in ("a", "b"):
            sample = {"routing": given[name], "importance": values[name]}
            engine.observe(name, **sample, tokens=tokens[name])
    assert engine.step() is None
    engine.record_to(None)
    for name, (told, routing, importance, count) in zip(("a", "b"), notes.samples, strict=True):
        assert (told, count) == (name, tokens[name])
        assert np.array_equal(routing, given[name])
        assert np.array_equal(importance, values[name])
    ranks = {name: engine.ranks(name).tolist() for name in ("a", "b")}
    assert notes.steps == [(1, ranks, None), "closed"]


@pytest.mark.parametrize(
    ("options", "policy", "name"),
    [
        ({}, None, "greedy"),
        ({"policy": "prune", "r_init": 24}, None, "prune"),
        ({}, Nothing(), "Nothing"),
    ],
)
def test_an_engine_and_an_event_say_what_they_are(options: Any, policy: Any, name: str) -> None:
    times = {"warmup_steps": 0, "growth_interval": 1, "growth_end": 4}
    engine = AllocatorEngine(AllocatorConfig(**times, **options), policy=policy)
    engine.add_layer("a<b", 2)
    assert name in repr(engine)
    engine.observe("a<b", routing=[0.5, 0.5], importance=np.ones((2, engine.config.r_max)))
    event = engine.step()
    assert event is not None
    assert f"{event!r}, ranks after it".replace("<", "&lt;") in event._repr_html_()
    assert event.unplaced == sum(engine.state_dict()["carry"])
    assert (event.unplaced == 0) is (policy is None)
