"""The engine and the reference, driven through the same random calls, never disagree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from drlora_core import AllocatorEngine, GrowthEvent, StatisticError, StepOrderError
from tests import reference
from tests.core.comparison import (
    assert_same_event,
    assert_same_state,
    assert_same_statistics,
    build,
    through_files,
)
from tests.strategies import layers, options

value = st.sampled_from([0.0, 0.25, 1.0]) | st.floats(0.0, 4.0, width=32)
bad_value = st.sampled_from([-1.0, float("nan"), float("inf"), -float("inf")])


class EngineMachine(RuleBasedStateMachine):
    """Samples in any order, wrong ones among them, skipped steps, stops and resumes."""

    engine: AllocatorEngine
    plain: reference.Engine

    @initialize(
        options=options(policies=("greedy", "rescored", "uniform", "prune", "move")),
        layers=layers(most=2),
    )
    def start(self, options: dict[str, Any], layers: dict[str, int]) -> None:
        self.engine = build(options, layers)
        self.plain = reference.Engine(self.engine.config.model_dump())
        for name, size in layers.items():
            self.plain.add_layer(name, size)
        self.before = {name: self.engine.ranks(name) for name in layers}

    def unobserved(self) -> list[str]:
        return [name for name, layer in self.plain.layers.items() if not layer.observed]

    def draw_sample(self, data: st.DataObject, name: str) -> tuple[list[float], list[Any]]:
        size, r_max = len(self.plain.layers[name].ranks), self.plain.options["r_max"]
        routing = data.draw(st.lists(value, min_size=size, max_size=size))
        numbers: st.SearchStrategy[Any] = value
        if self.plain.options["policy"] in ("prune", "move") or data.draw(st.booleans()):
            numbers = st.lists(value, min_size=r_max, max_size=r_max)
        return routing, data.draw(st.lists(numbers, min_size=size, max_size=size))

    @precondition(lambda self: self.unobserved())
    @rule(data=st.data())
    def observe(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.unobserved()))
        routing, importance = self.draw_sample(data, name)
        self.engine.observe(name, routing=routing, importance=importance)
        self.plain.layers[name].observe(routing, importance)

    @rule(data=st.data(), seed=st.integers(0, 2**32 - 1))
    def finish_the_step(self, data: st.DataObject, seed: int) -> None:
        """Cheap samples for whoever is left, so that runs get as far as their events."""
        generator = np.random.default_rng(seed)
        for name in self.unobserved():
            size, r_max = len(self.plain.layers[name].ranks), self.plain.options["r_max"]
            routing, importance = generator.random(size), generator.random((size, r_max))
            self.engine.observe(name, routing=routing, importance=importance)
            self.plain.layers[name].observe(routing.tolist(), importance.tolist())
        self.step()

    @precondition(lambda self: self.unobserved())
    @rule(data=st.data(), wrong=bad_value)
    def observe_wrong_values(self, data: st.DataObject, wrong: float) -> None:
        name = data.draw(st.sampled_from(self.unobserved()))
        routing, importance = self.draw_sample(data, name)
        expert = data.draw(st.integers(0, len(routing) - 1))
        if data.draw(st.booleans()) or self.plain.layers[name].ranks[expert] == 0:
            routing[expert] = wrong
        elif isinstance(importance[expert], list):
            importance[expert][0] = wrong
        else:
            importance[expert] = wrong
        before = self.engine.state_dict()
        with pytest.raises(StatisticError, match="accepted: finite numbers >= 0"):
            self.engine.observe(name, routing=routing, importance=importance)
        assert_same_state(self.engine.state_dict(), before)

    @precondition(lambda self: len(self.unobserved()) < len(self.plain.layers))
    @rule(data=st.data())
    def observe_again(self, data: st.DataObject) -> None:
        observed = [name for name in self.plain.layers if name not in self.unobserved()]
        name = data.draw(st.sampled_from(observed))
        before = self.engine.state_dict()
        with pytest.raises(StepOrderError, match="already observed"):
            self.engine.observe(name, routing=[0.0], importance=[0.0])
        with pytest.raises(StepOrderError, match="already observed"):
            self.engine.skip(name)
        assert_same_state(self.engine.state_dict(), before)

    @precondition(lambda self: self.unobserved())
    @rule(data=st.data())
    def skip(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.unobserved()))
        self.engine.skip(name)
        self.plain.layers[name].observed = True

    @precondition(lambda self: self.unobserved())
    @rule()
    def step_too_early(self) -> None:
        before = self.engine.state_dict()
        with pytest.raises(StepOrderError, match=r"call engine\.observe"):
            self.engine.step()
        assert_same_state(self.engine.state_dict(), before)

    @precondition(lambda self: not self.unobserved())
    @rule()
    def step(self) -> None:
        self.before = {name: self.engine.ranks(name) for name in self.plain.layers}
        event, expected = self.engine.step(), self.plain.step()
        assert (event is None) == (expected is None)
        if event is not None and expected is not None:
            assume(not expected.undecided)
            assume(not any(reference.near_tie(s.tolist()) for s in event.saliency.values()))
            assert_same_event(event, expected, self.plain)
            self.check_event(event)

    def check_event(self, event: GrowthEvent) -> None:
        for name, before in self.before.items():
            delta, ranks, saliency = event.deltas[name], event.ranks[name], event.saliency[name]
            assert delta.dtype == ranks.dtype == np.int64
            assert saliency.dtype == np.float64
            assert delta.shape == ranks.shape == saliency.shape == before.shape
            assert (ranks == before + delta).all()
            assert (ranks == self.engine.ranks(name)).all()
            if self.plain.options["policy"] == "prune":
                assert (delta <= 0).all()
                assert event.cut[name].sum() == -delta.sum()
            elif self.plain.options["policy"] == "move":
                assert (event.cut[name].sum(axis=1) == np.maximum(-delta, 0)).all()
            else:
                assert (delta >= 0).all()
            assert (self.engine.rank_importance(name)[delta > 0] == 0).all()

    @rule(knows_layers=st.booleans())
    def stop_and_resume(self, knows_layers: bool) -> None:
        state = self.engine.state_dict()
        sizes = {name: len(layer.ranks) for name, layer in self.plain.layers.items()}
        engine = build(self.plain.options, sizes if knows_layers else {})
        engine.load_state_dict(through_files(state))
        assert_same_state(engine.state_dict(), state)
        self.engine = engine

    @invariant()
    def agrees_with_the_reference(self) -> None:
        assert_same_statistics(self.engine, self.plain)
        assert self.engine.step_count == self.plain.t

    @invariant()
    def keeps_bounds_and_budget(self) -> None:
        config = self.engine.config
        for name in self.engine.layer_names:
            ranks = self.engine.ranks(name)
            assert ranks.dtype == np.int64
            assert ranks.shape == (self.engine.num_experts(name),)
            assert ranks.max() <= config.r_max
            assert ranks.min() >= config.least_rank
            if config.policy == "prune":
                assert (ranks <= self.before[name]).all()
                assert ranks.sum() >= self.engine.budget(name)
            else:
                assert ranks.sum() <= self.engine.budget(name)
            if config.policy == "move":
                assert ranks.sum() >= self.before[name].sum()
            elif config.policy != "prune":
                assert (ranks >= self.before[name]).all()


TestEngineMachine = EngineMachine.TestCase
