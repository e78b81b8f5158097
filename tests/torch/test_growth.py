"""Growth and pruning: what an event changes, and what it must leave as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from drlora_core import AllocationRequest
from drlora_torch.lora.rows import RowGenerator
from tests.marks import slow_but
from tests.torch import helpers, models, reference


def train(
    steps: int, layout: str = "pooled", *, config: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, list[float]]:
    """Train a fresh model; the adapter (its model is alive through it) and the losses."""
    model = models.build()
    adapter = helpers.attach(model, layout=layout, config=config, **options)
    optimizer = helpers.adamw(adapter, weight_decay=0.1)
    return adapter, [helpers.step(model, optimizer, seed) for seed in range(steps)]


def rows_by_dimension(adapter: Any) -> dict[tuple[str, str, int, int, str], torch.Tensor]:
    """Every active row of A and B by (layer, projection, expert, rank dimension, which)."""
    rows = {}
    for name, projection, lora, slots in helpers.projections(adapter):
        for expert in range(lora.table.num_experts):
            for dimension, slot in enumerate(helpers.owned(lora, expert)):
                rows[name, projection, expert, dimension, "A"] = slots.lora_A[slot].detach()
                rows[name, projection, expert, dimension, "B"] = slots.lora_B[slot].detach()
    return rows


def deltas(adapter: Any) -> list[torch.Tensor]:
    """s B A of every expert of every projection."""
    return [
        reference.expert_delta(lora, projection, expert)
        for _, projection, lora, _ in helpers.projections(adapter)
        for expert in range(lora.table.num_experts)
    ]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(models.tokens(seed=9)).logits


@pytest.mark.parametrize("layout", ["pooled", "masked"])
def test_event_leaves_the_function_as_it_was(layout: str) -> None:
    """W + s B A is the same bit for bit; outputs differ by the rounding of longer sums only."""
    model = models.build(dtype=torch.float64)
    adapter = helpers.attach(model, layout=layout, auto_step=False)
    optimizer = helpers.adamw(adapter)
    grew = 0
    for seed in range(6):
        helpers.step(model, optimizer, seed)
        before, output = deltas(adapter), logits(model)
        event = adapter.step()
        assert all(map(helpers.equal, before, deltas(adapter)))
        torch.testing.assert_close(logits(model), output, rtol=1e-12, atol=1e-12)
        grew += 0 if event is None else sum(int(d.sum()) for d in event.deltas.values())
    assert grew == 2 * models.EXPERTS * 2  # layers x experts x (r_target - r_init)


@pytest.mark.parametrize("layout", ["pooled", "masked"])
def test_newborn_rows(layout: str) -> None:
    """A is drawn from (seed, layer, projection, expert, dimension) alone; B is 0."""
    adapter, _ = train(6, layout, config={"seed": 3})
    assert [event.step for event in adapter.events] == [4, 6]
    rows = rows_by_dimension(adapter)
    last = adapter.events[-1]
    newborn = 0
    for name, projection, lora, slots in helpers.projections(adapter):
        width = slots.lora_A.shape[1]
        generator = RowGenerator(3, name, projection, width)
        for expert in range(lora.table.num_experts):
            rank = int(last.ranks[name][expert])
            assert rank == len(helpers.owned(lora, expert))
            for dimension in range(rank - int(last.deltas[name][expert]), rank):
                newborn += 1
                drawn = torch.from_numpy(generator.draw(expert, dimension))
                assert torch.equal(rows[name, projection, expert, dimension, "A"], drawn)
                assert not rows[name, projection, expert, dimension, "B"].any()
                assert float(drawn.abs().max()) <= width**-0.5
    assert newborn > 0


def test_rows_are_independent_and_spread_evenly() -> None:
    rows = [
        RowGenerator(seed, layer, projection, 64).draw(expert, dimension)
        for seed in (0, 1)
        for layer in ("a", "b")
        for projection in ("up", "down")
        for expert in range(8)
        for dimension in range(8)
    ]
    drawn = np.stack(rows)
    assert len(np.unique(drawn, axis=0)) == len(rows)
    correlation = np.corrcoef(drawn)[np.triu_indices(len(rows), 1)]
    assert abs(correlation).max() < 0.75  # 64 numbers each: 6 standard deviations
    # Kaiming uniform with a = sqrt(5): variance 1 / (3 width)
    assert drawn.var() == pytest.approx(1 / (3 * 64), rel=0.02)
    assert abs(drawn.mean()) < 5 * (1 / (3 * 64 * drawn.size)) ** 0.5


@pytest.mark.parametrize(
    "config",
    slow_but(
        [
            {},
            {"policy": "rescored", "max_growth": 2},
            {"policy": "proportional"},
            {"policy": "random"},
            {"policy": "uniform"},
            {"policy": "prune", "r_init": 6},
            {"policy": "move", "move_share": 0.5},
            {"scope": "global"},
            {"scope": "global", "layer_ceiling": 5, "policy": "proportional"},
            {"scope": "global", "policy": "prune", "r_init": 6},
            {"use_routing": False},
            {"use_importance": False},
            {"quota": 3},
        ],
        [{}, {"policy": "random"}, {"policy": "prune", "r_init": 6}, {"scope": "global"}],
    ),
    ids=str,
)
def test_layouts_agree_bit_for_bit(config: dict[str, Any]) -> None:
    (pooled, losses), (masked, same) = train(8, config=config), train(8, "masked", config=config)
    assert losses == same
    assert helpers.rank_history(pooled) == helpers.rank_history(masked)
    left, right = rows_by_dimension(pooled), rows_by_dimension(masked)
    assert left.keys() == right.keys()
    assert all(helpers.equal(left[key], right[key]) for key in left)
    total = sum(int(ranks.sum()) for ranks in pooled.ranks().values())
    budget = 2 * models.EXPERTS * 4
    placed = 2 * (models.EXPERTS * 2 + 6) if "quota" in config else budget
    assert total == placed
    for name, ranks in pooled.ranks().items():
        assert ranks.tolist() == pooled.engine.ranks(name).tolist()


@pytest.mark.parametrize("layout", ["pooled", "masked"])
@pytest.mark.parametrize(
    "config", [{}, {"policy": "prune", "r_init": 6}, {"policy": "move"}], ids=str
)
def test_free_slots_are_exactly_zero(layout: str, config: dict[str, Any]) -> None:
    model = models.build()
    adapter = helpers.attach(model, layout=layout, config=config)
    optimizer = helpers.adamw(adapter, weight_decay=0.5)
    seen = 0
    for seed in range(8):
        helpers.step(model, optimizer, seed)
        for _, _, lora, slots in helpers.projections(adapter):
            unowned = helpers.free(lora)
            seen += len(unowned)
            for parameter in (slots.lora_A, slots.lora_B):
                assert not parameter[unowned].any()
                assert not optimizer.state[parameter]["exp_avg"][unowned].any()
                assert not optimizer.state[parameter]["exp_avg_sq"][unowned].any()
    assert seen > 0


def test_prune_keeps_the_most_important_dimensions_and_their_rows() -> None:
    model = models.build()
    adapter = helpers.attach(model, config={"policy": "prune", "r_init": 6}, auto_step=False)
    optimizer = helpers.adamw(adapter)
    cuts = 0
    for seed in range(6):
        helpers.step(model, optimizer, seed)
        before = rows_by_dimension(adapter)
        event = adapter.step()
        if event is None:
            continue
        for name, projection, lora, _ in helpers.projections(adapter):
            after = rows_by_dimension(adapter)
            for expert in range(lora.table.num_experts):
                old_rank = int((event.ranks[name] - event.deltas[name])[expert])
                kept = [j for j in range(old_rank) if not event.cut[name][expert, j]]
                cuts += old_rank - len(kept)
                assert len(helpers.owned(lora, expert)) == len(kept) >= 1
                for dimension, old in enumerate(kept):
                    for which in "AB":
                        assert torch.equal(
                            after[name, projection, expert, dimension, which],
                            before[name, projection, expert, old, which],
                        )
    assert cuts == 2 * 2 * models.EXPERTS * 2  # projections x layers x experts x (6 - 4)


@pytest.mark.parametrize("layout", ["pooled", "masked"])
def test_random_streams_are_untouched(layout: str) -> None:
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    model = models.build()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    adapter = helpers.attach(model, layout=layout, config={"policy": "random"})
    optimizer = helpers.adamw(adapter)
    for seed in range(6):
        helpers.step(model, optimizer, seed)
    assert len(adapter.events) == 2
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_scaling_never_changes() -> None:
    adapter, _ = train(6, alpha=12.0)
    assert {layer.lora.scaling for layer in adapter.layers.values()} == {12.0 / 4}
    adapter, _ = train(6, alpha=12.0, rslora=True)
    assert {layer.lora.scaling for layer in adapter.layers.values()} == {12.0 / 2}


def test_memory_is_that_of_uniform_lora() -> None:
    pooled, masked = train(0)[0], train(0, "masked")[0]
    uniform = train(0, config={"policy": "uniform"})[0]
    size = [sum(p.numel() for p in a.parameters()) for a in (pooled, masked, uniform)]
    assert size[0] == size[2] == size[1] * 4 // 8  # r_target / r_max


def test_a_policy_of_the_users_own() -> None:
    def first_expert_takes_all(request: AllocationRequest) -> np.ndarray:
        growth = np.zeros_like(request.ranks)
        left = request.quota
        for expert in range(growth.size):
            growth[expert] = min(left, request.limits[expert])
            left -= growth[expert]
        return growth

    import drlora_torch
    from drlora_core import AllocatorConfig, AllocatorEngine

    model = models.build()
    engine = AllocatorEngine(AllocatorConfig(**helpers.CONFIG), policy=first_expert_takes_all)
    adapter = drlora_torch.attach(model, engine)
    optimizer = helpers.adamw(adapter)
    for seed in range(6):
        helpers.step(model, optimizer, seed)
    assert set(map(tuple, helpers.rank_history(adapter).values())) == {(8, 8, 6, 2, 2, 2, 2, 2)}
