"""Engine and layers never have other ranks than each other without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import drlora_torch
from drlora_core import AllocatorEngine, LayoutError, StepOrderError
from tests.torch import helpers, models


def observe_everything(engine: AllocatorEngine) -> None:
    values = np.ones((len(engine.layer_names), 8))
    engine.observe_all(routing=values, importance=values)


@pytest.mark.parametrize(
    "call",
    [
        observe_everything,
        lambda engine: engine.observe(engine.layer_names[0], routing=[1.0] * 8, importance=None),
        lambda engine: engine.skip(engine.layer_names[0]),
        lambda engine: engine.step(),
        lambda engine: engine.load_state_dict(engine.state_dict()),
    ],
    ids=["observe_all", "observe", "skip", "step", "load_state_dict"],
)
def test_the_engine_of_a_model_is_not_driven_by_hand(call: Any, tmp_path: Path) -> None:
    """The event after step 4 comes, in engine and layers alike, as if nobody had tried."""
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for seed in range(4):
        helpers.step(model, optimizer, seed)
        with pytest.raises(StepOrderError, match=r"driven by a model.*adapter.step.*restore"):
            call(adapter.engine)
    assert adapter.engine.step_count == 4
    assert len(adapter.events) == 1
    for name, ranks in adapter.ranks().items():
        assert ranks.tolist() == adapter.engine.ranks(name).tolist()
    adapter.save_pretrained(tmp_path)
    adapter.restore(tmp_path)
    adapter.detach()
    observe_everything(adapter.engine)
    adapter.engine.step()


def test_layers_that_lost_step_with_the_engine_are_found_before_an_event() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    helpers.grow(next(iter(adapter.layers.values())).lora, [1] + [0] * 7)
    for seed in range(3):
        helpers.step(model, optimizer, seed)
    for _ in range(2):  # it does not go away, and no event spends a budget meanwhile
        with pytest.raises(LayoutError, match="holds other ranks than the engine"):
            helpers.step(model, optimizer)
    assert adapter.engine.step_count == 3
    assert not adapter.events


def test_an_event_that_is_not_carried_out_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from drlora_torch.lora.slots import Born, SlotTable

    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for seed in range(3):
        helpers.step(model, optimizer, seed)
    nothing = Born(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    monkeypatch.setattr(SlotTable, "grow", lambda table, growth: nothing)
    with pytest.raises(LayoutError, match="holds other ranks than the engine"):
        helpers.step(model, optimizer)
    assert isinstance(drlora_torch.adapters(model)["default"], drlora_torch.Adapter)


def test_an_adapter_comes_back_to_an_engine_of_its_own_ranks_alone() -> None:
    """While it is merged, its engine is free."""
    model = models.build()
    adapter = helpers.attach(model)
    adapter.merge()
    merged = [parameter.detach().clone() for parameter in model.parameters()]
    other = drlora_torch.attach(models.build(), adapter.engine)
    with pytest.raises(LayoutError, match="driven by another model"):
        adapter.unmerge()
    other.detach()
    state = adapter.engine.state_dict()
    for _ in range(4):
        observe_everything(adapter.engine)
        adapter.engine.step()
    with pytest.raises(LayoutError, match="holds other ranks than the engine"):
        adapter.unmerge()
    assert all(map(helpers.equal, merged, model.parameters()))
    adapter.engine.load_state_dict(state)
    adapter.unmerge()
    helpers.step(model, helpers.adamw(adapter))
    assert adapter.engine.step_count == 1
