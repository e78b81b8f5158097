"""Random lives of several adapters on one model, against models with one adapter each."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import drlora_torch
from tests.torch import helpers, models, named
from tests.torch.named import life, outputs, same
from tests.torch.test_life import Picture

NAMES = st.sampled_from("abc")
SEEDS = st.integers(0, 5)
FAMILY = st.sampled_from(["olmoe", "dbrx", "switch_transformers"])


def build(family: str) -> Any:
    if family == "olmoe":
        return models.build(num_hidden_layers=2, hidden_size=16, intermediate_size=8)
    return named.build(family)


@dataclasses.dataclass(slots=True)
class Trained:
    """An adapter with its optimizer."""

    model: Any
    adapter: drlora_torch.Adapter
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: Any, adapter: drlora_torch.Adapter) -> Trained:
        return cls(model, adapter, helpers.adamw(adapter, weight_decay=0.1))


class NamedAdapters(RuleBasedStateMachine):
    """``shared`` has adapters on one model; ``single`` has the same, each on a model of its own."""

    @initialize(family=FAMILY)
    def begin(self, family: str) -> None:
        self.family = family
        self.model = build(family)
        self.base = outputs(self.model)
        self.picture = Picture(self.model)
        del self.picture.global_hooks  # the single ones have some too
        self.shared: dict[str, Trained] = {}
        self.single: dict[str, Trained] = {}
        self.active: str | None = None

    @rule(name=NAMES, router=st.sampled_from(["frozen", "after_warmup", "trainable"]))
    def attach(self, name: str, router: str) -> None:
        if name in self.shared:
            with pytest.raises(drlora_torch.AttachError, match="another adapter_name than"):
                named.attach(self.model, name)
            return
        for model, group in ((self.model, self.shared), (build(self.family), self.single)):
            group[name] = Trained.of(model, named.attach(model, name, router=router))
        self.active = name

    @rule(name=NAMES)
    def activate(self, name: str) -> None:
        if name not in self.shared:
            with pytest.raises(drlora_torch.AttachError, match=f"no adapter '{name}'"):
                drlora_torch.set_adapter(self.model, name)
            return
        assert drlora_torch.set_adapter(self.model, name) is self.shared[name].adapter
        self.active = name

    @precondition(lambda self: self.active is not None)
    @rule(seeds=st.lists(SEEDS, min_size=1, max_size=3))
    def train(self, seeds: list[int]) -> None:
        for seed in seeds:
            shared, single = (
                named.step(each.model, each.optimizer, seed)
                for each in (self.shared[self.active], self.single[self.active])  # type: ignore[index]
            )
            assert shared == single

    @precondition(lambda self: len(self.shared) > 1)
    @rule(name=NAMES)
    def step_of_a_resting_optimizer(self, name: str) -> None:
        if name in self.shared and name != self.active:
            self.shared[name].optimizer.step()

    @precondition(lambda self: self.shared)
    @rule(name=NAMES)
    def save_detach_and_load(self, name: str) -> None:
        if name not in self.shared:
            return
        state = self.shared[name].optimizer.state_dict()
        with tempfile.TemporaryDirectory() as folder:
            self.shared[name].adapter.save_pretrained(folder)
            self.detach_shared(name)
            loaded = drlora_torch.load(self.model, folder, adapter_name=name)
        self.shared[name] = Trained.of(self.model, loaded)
        self.shared[name].optimizer.load_state_dict(state)
        self.active = name

    @rule(name=NAMES)
    def detach(self, name: str) -> None:
        if name in self.shared:
            self.detach_shared(name)
            del self.single[name]

    def detach_shared(self, name: str) -> None:
        self.shared.pop(name).adapter.detach()
        if self.active == name:
            self.active = next(reversed(self.shared), None)

    @invariant()
    def each_is_as_it_would_be_alone(self) -> None:
        for name, shared in self.shared.items():
            single = self.single[name]
            assert same(
                life(shared.adapter, shared.optimizer), life(single.adapter, single.optimizer)
            )

    @invariant()
    def the_model_is_that_of_the_active_one(self) -> None:
        attached = drlora_torch.adapters(self.model)
        assert attached == {name: each.adapter for name, each in self.shared.items()}
        assert [n for n, adapter in attached.items() if adapter.is_active] == (
            [] if self.active is None else [self.active]
        )
        if self.active is None:
            self.picture.assert_unchanged(self.model)
            assert torch.equal(outputs(self.model), self.base)
        else:
            assert torch.equal(outputs(self.model), outputs(self.single[self.active].model))
            with self.shared[self.active].adapter.disabled():
                assert torch.equal(outputs(self.model), self.base)

    def teardown(self) -> None:
        for each in self.shared.values():
            each.adapter.detach()
        self.picture.assert_unchanged(self.model)


TestNamedAdapters = pytest.mark.slow(NamedAdapters.TestCase)
TestNamedAdapters.settings = settings(max_examples=20, stateful_step_count=15)
