"""An engine that a model drives is changed by its owner alone."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest

from drlora_core import AllocatorConfig, AllocatorEngine, LayoutError, StepOrderError

VALUES = [0.5, 0.5]


class Model:
    """Whoever drives an engine."""


def make() -> AllocatorEngine:
    engine = AllocatorEngine(AllocatorConfig())
    engine.add_layer("a", num_experts=2)
    return engine


CALLS: dict[str, Callable[[AllocatorEngine], object]] = {
    "add_layer": lambda engine: engine.add_layer("b", num_experts=2),
    "observe": lambda engine: engine.observe("a", routing=VALUES, importance=VALUES),
    "observe_all": lambda engine: engine.observe_all(routing=[VALUES], importance=[VALUES]),
    "skip": lambda engine: engine.skip("a"),
    "step": lambda engine: engine.step(),
    "load_state_dict": lambda engine: engine.load_state_dict(make().state_dict()),
}


@pytest.mark.parametrize("name", CALLS)
def test_only_the_owner_changes_an_engine(name: str) -> None:
    engine, owner = make(), Model()
    if name == "step":
        engine.skip("a")
    engine.driver.take(owner, "use model.train()")
    with pytest.raises(StepOrderError, match=rf"engine.{name}\(\) was called .*use model.train"):
        CALLS[name](engine)
    assert engine.step_count == 0
    assert engine.layer_names == ("a",)
    assert not engine.pending
    assert engine.is_observed("a") is (name == "step")
    with engine.driver.acting():
        CALLS[name](engine)


def test_an_engine_is_free_again_once_its_owner_is_gone_and_so_is_a_copy() -> None:
    engine, owner = make(), Model()
    engine.driver.take(owner, "")
    for free in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        free.skip("a")
    assert engine.driver.owner is owner
    del owner
    gc.collect()
    engine.skip("a")
    another = Model()
    engine.driver.take(another, "")
    with pytest.raises(LayoutError, match="driven by another model"):
        engine.driver.take(Model(), "")
    engine.driver.give_back()
    engine.step()
