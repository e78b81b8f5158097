"""Policy ``move`` on a model: rank changes owner in one event, in both layouts, and travels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import drlora_torch
from drlora_torch.adapter import state_of
from drlora_torch.errors import RunError
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.finetune.starting import adopt
from drlora_torch.lora.rows import RowGenerator
from drlora_torch.lora.slots import Layout, SlotTable
from drlora_torch.step.newborn import OLD
from drlora_torch.storage import adapter_file
from tests.torch import helpers, models, reference
from tests.torch.test_checkpoint import rewrite
from tests.torch.test_growth import rows_by_dimension

LAYOUTS = ("pooled", "masked")
MOVE: dict[str, Any] = {
    **{"policy": "move", "move_share": 1.0, "r_init": 4, "warmup_steps": 1, "growth_end": 9},
    **{"max_growth": 2},
}
"""Events after steps 3, 5, 7 and 9, at a constant budget."""
STEPS = 10


def started(layout: str = "pooled", **options: Any) -> tuple[Any, Any, torch.optim.AdamW]:
    model = models.build()
    adapter = helpers.attach(model, layout=layout, config=MOVE, **options)
    return model, adapter, helpers.adamw(adapter, weight_decay=0.1)


def moved(event: Any) -> int:
    return sum(int(cut.sum()) for cut in event.cut.values())


def test_layouts_agree_bit_for_bit_at_a_constant_budget() -> None:
    runs = []
    for layout in LAYOUTS:
        model, adapter, optimizer = started(layout)
        losses = [helpers.step(model, optimizer, seed) for seed in range(STEPS)]
        assert [event.step for event in adapter.events] == [3, 5, 7, 9]
        assert sum(moved(event) > 0 for event in adapter.events) >= 3
        for event in adapter.events:
            assert {int(ranks.sum()) for ranks in event.ranks.values()} == {4 * models.EXPERTS}
        runs.append((losses, helpers.rank_history(adapter), rows_by_dimension(adapter)))
    (losses, ranks, rows), (same_losses, same_ranks, same_rows) = runs
    assert losses == same_losses
    assert ranks == same_ranks
    assert rows.keys() == same_rows.keys()
    assert all(helpers.equal(rows[key], same_rows[key]) for key in rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_event_cuts_first_and_what_it_gives_is_newborn(layout: str) -> None:
    """Kept rows stay, W + s B A loses what is cut alone, and moved slots are as in a fresh run."""
    model, adapter, optimizer = started(layout, auto_step=False)
    drawn: set[bytes] = set()
    for seed in range(STEPS):
        helpers.step(model, optimizer, seed)
        before = {key: row.clone() for key, row in rows_by_dimension(adapter).items()}
        functions = {each[:3]: each[3] for each in experts_of(adapter)}
        event = adapter.step()
        if event is None:
            continue
        after = rows_by_dimension(adapter)
        for name, projection, expert, function in experts_of(adapter):
            cut, rank = event.cut[name][expert], int(event.ranks[name][expert])
            kept = np.flatnonzero(~cut[: rank - int(event.deltas[name][expert])]).tolist()
            place = (name, projection, expert)
            for j, was in enumerate(kept):
                for which in "AB":
                    now, then = after[(*place, j, which)], before[(*place, was, which)]
                    assert torch.equal(now, then)
            lost = torch.zeros_like(function)
            for j in np.flatnonzero(cut).tolist():
                lost += torch.outer(before[(*place, j, "B")], before[(*place, j, "A")])
            scaling = adapter.layers[name].lora.scaling
            torch.testing.assert_close(function, functions[place] - scaling * lost)
            for j in range(len(kept), rank):
                row = after[(*place, j, "A")]
                number = j + sum(int(each.cut[name][expert].sum()) for each in adapter.events)
                generator = RowGenerator(0, name, projection, row.numel())
                assert torch.equal(row, torch.from_numpy(generator.draw(expert, number)))
                assert not after[(*place, j, "B")].any()
                assert row.numpy().tobytes() not in drawn
                drawn.add(row.numpy().tobytes())
        assert_moved_slots_are_fresh(adapter, optimizer, event)
    assert len(drawn) == 2 * sum(map(moved, adapter.events)) > 16  # two projections


def experts_of(adapter: Any) -> list[tuple[str, str, int, torch.Tensor]]:
    """Layer, projection, expert and its s B A."""
    return [
        (name, projection, expert, reference.expert_delta(lora, projection, expert))
        for name, projection, lora, _ in helpers.projections(adapter)
        for expert in range(lora.table.num_experts)
    ]


def assert_moved_slots_are_fresh(adapter: Any, optimizer: Any, event: Any) -> None:
    for name, _, lora, slots in helpers.projections(adapter):
        growth = event.deltas[name] + event.cut[name].sum(axis=1)
        born = [
            slot
            for expert, units in enumerate(growth.tolist())
            for slot in helpers.owned(lora, expert)[lora.table.ranks()[expert] - units :]
        ]
        unowned = helpers.free(lora)
        assert (state_of(adapter).ages[name][born] == 0).all()
        assert (state_of(adapter).ages[name][unowned] == OLD).all()
        for parameter in (slots.lora_A, slots.lora_B):
            assert not parameter[unowned].any()
            for average in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[parameter][average][born + unowned].any()


@pytest.mark.parametrize("stop", [3, 4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, layout: str, stop: int) -> None:
    model, adapter, optimizer = started(layout)
    for seed in range(stop):
        helpers.step(model, optimizer, seed)
    adapter.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    losses = [helpers.step(model, optimizer, seed) for seed in range(stop, STEPS)]

    second = models.build()
    again = drlora_torch.load(second, tmp_path)
    second_optimizer = helpers.adamw(again, weight_decay=0.1)
    second_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert [helpers.step(second, second_optimizer, s) for s in range(stop, STEPS)] == losses
    assert helpers.rank_history(again) == helpers.rank_history(adapter)
    assert [moved(event) for event in again.events] == [moved(event) for event in adapter.events]
    pairs = zip(again.parameters(), adapter.parameters(), strict=True)
    assert all(helpers.equal(a.detach(), b.detach()) for a, b in pairs)


def test_experts_without_rank_train_on() -> None:
    """With r_min 0 an expert may end with nothing, and be given rank again."""
    runs = []
    for layout in LAYOUTS:
        model = models.build()
        config = MOVE | {"r_min": 0, "r_init": 1, "r_target": 1, "max_growth": None}
        adapter = helpers.attach(model, layout=layout, config=config)
        optimizer = helpers.adamw(adapter)
        runs.append([helpers.step(model, optimizer, seed) for seed in range(STEPS)])
        ranks = np.concatenate([event.ranks[n] for event in adapter.events for n in event.ranks])
        assert ranks.min() == 0
        assert np.isfinite(runs[-1]).all()
    assert runs[0] == runs[1]


@pytest.mark.parametrize("layout", list(Layout))
def test_growth_after_cuts_finds_free_slots(layout: Layout) -> None:
    generator = np.random.default_rng(0)
    table = SlotTable(12, num_experts=3, r_max=4, layout=layout)
    for _ in range(60):
        ranks = table.ranks()
        cut = (generator.random((3, 4)) < 0.4) & (np.arange(4) < ranks[:, None])
        table.cut(cut)
        left = table.ranks()
        born = table.grow(generator.integers(0, 4 - left + 1))
        assert (table.owner[born.slots] == born.experts).all()
        assert (table.position[born.slots] == born.positions).all()
        owned = table.owner >= 0
        held = sorted(zip(table.owner[owned].tolist(), table.position[owned].tolist(), strict=True))
        assert held == [(e, j) for e, rank in enumerate(table.ranks()) for j in range(rank)]
        if layout is Layout.MASKED:
            assert (table.owner[owned] == np.flatnonzero(owned) // 4).all()


def test_an_adapter_saved_before_these_fields_existed_loads(tmp_path: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model, config={"policy": "prune", "r_init": 6})
    helpers.step(model, helpers.adamw(adapter))
    adapter.save_pretrained(tmp_path)

    def older(description: Any) -> None:
        for field in ("move_share", "r_min"):
            del description["engine"]["config"][field]

    rewrite(tmp_path, description=older)
    loaded = drlora_torch.load(models.build(), tmp_path)
    assert loaded.engine.config == adapter.engine.config
    adapter.restore(tmp_path)
    assert "r_min" not in json.dumps(adapter_file.read(tmp_path)[1])
    options = FinetuneOptions(model="m", data="d", adapter=str(tmp_path), policy="prune", r_min=2)
    with pytest.raises(RunError, match="--r-min 2: the adapter to start from has 1, and keeps it"):
        adopt(options)
    kept = adopt(options.model_copy(update={"r_min": 1}))
    assert (kept.r_init, kept.r_min, kept.move_share) == (6, 1, 0.2)
