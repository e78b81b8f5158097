"""Policy ``move``: what an event may do to ranks, and that rank comes to rest.

That the decisions are those of the slow reference is in test_against_reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import AllocatorConfig, AllocatorEngine, GrowthEvent, LayoutError, StatisticError
from drlora_core import moving as moves
from drlora_core.testing import make_request
from tests.core.comparison import assert_same_events, assert_same_state, build, feed, through_files
from tests.strategies import layers, make_samples, options, seeds, styles

MOVING: dict[str, Any] = {
    **{"policy": "move", "move_share": 1.0, "r_init": 4, "r_target": 4, "r_max": 8},
    **{"warmup_steps": 2, "growth_interval": 2, "growth_end": 80},
}


def constant_run(worth: Any, **changes: Any) -> tuple[AllocatorEngine, list[GrowthEvent]]:
    """Drive one layer with the same sample at every step."""
    engine = build(MOVING | changes, {"a": len(worth)})
    events = []
    for _ in range(engine.config.growth_end):
        engine.observe("a", routing=worth, importance=np.ones((len(worth), 8)))
        events += [event for event in [engine.step()] if event is not None]
    return engine, events


def moved(event: GrowthEvent) -> int:
    return sum(int(cut.sum()) for cut in event.cut.values())


@given(options(policies=("move",)), layers(), seeds, styles)
def test_every_event_keeps_the_rules(
    options: dict[str, Any], layers: dict[str, int], seed: int, style: str
) -> None:
    engine = build(options, layers)
    config, budget = engine.config, {name: n * options["r_target"] for name, n in layers.items()}
    samples = make_samples(options, layers, seed, style, options["growth_end"])
    before = {name: engine.ranks(name) for name in layers}
    grew = {name: np.zeros(n, dtype=bool) for name, n in layers.items()}
    for event in feed(engine, samples):
        if event is None:
            continue
        for name, n in layers.items():
            delta, cut = event.deltas[name], event.cut[name].sum(axis=1)
            growth = delta + cut
            assert (event.ranks[name] == before[name] + delta).all()
            assert event.cut[name].shape == (n, config.r_max)
            assert not event.cut[name][np.arange(config.r_max) >= before[name][:, None]].any()
            assert growth.min() >= 0
            assert not ((growth > 0) & (cut > 0)).any()
            assert not (grew[name] & (cut > 0)).any()
            assert event.ranks[name].max() <= config.r_max
            assert (event.ranks[name][cut > 0] >= config.r_min).all()
            assert config.max_growth is None or growth.max() <= config.max_growth
            total = event.ranks[name].sum()
            assert before[name].sum() <= total <= budget[name]
            if config.r_init == config.r_target:
                assert total == budget[name]
            share = config.move_share * (config.num_events - event.index + 1) / config.num_events
            assert cut.sum() <= share * before[name].sum() + 1e-9
            before[name], grew[name] = event.ranks[name], growth > 0
    if config.quota is None:
        placed = sum(int(ranks.sum()) for ranks in before.values())
        assert placed + sum(engine.state_dict()["carry"]) == sum(budget.values())


@given(options(policies=("move",)), layers(), seeds, styles, st.data())
def test_a_resumed_run_goes_on_bit_for_bit(
    options: dict[str, Any], layers: dict[str, int], seed: int, style: str, data: st.DataObject
) -> None:
    samples = make_samples(options, layers, seed, style, options["growth_end"] + 1)
    stop = data.draw(st.integers(0, len(samples)))
    whole, first = build(options, layers), build(options, layers)
    expected = feed(whole, samples)
    feed(first, samples[:stop])
    resumed = build(options, layers)
    resumed.load_state_dict(through_files(first.state_dict()))
    assert_same_events(feed(resumed, samples[stop:]), expected[stop:])
    assert_same_state(resumed.state_dict(), whole.state_dict())


WORTHS = [
    [8.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.9, 1.0, 1.0, 1.1, 5.0],
    [3.0, 0.0, 0.0],
]


@pytest.mark.parametrize("worth", WORTHS, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("r_min", [0, 1])
def test_rank_comes_to_rest_under_constant_statistics(
    worth: list[float], gamma: float, r_min: int
) -> None:
    """It does so long before the damping ends it, and what it comes to is worth most."""
    engine, events = constant_run(worth, gamma=gamma, r_min=r_min)
    units = [moved(event) for event in events]
    assert len(units) == 39
    assert units[20:] == [0] * 19
    ranks = engine.ranks("a")
    assert ranks.sum() == 4 * len(worth)
    gains = [w / (r + 1) ** gamma for w, r in zip(worth, ranks, strict=True) if r < 8]
    losses = [w / max(r, 1) ** gamma for w, r in zip(worth, ranks, strict=True) if r > r_min]
    assert max(gains, default=0.0) <= moves.GAIN * min(losses, default=np.inf) * (1 + 1e-9)
    if len(set(worth)) == 1:
        assert sum(units) == 0


def test_without_worth_rank_goes_back_and_forth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""

    def whatever(request: Any, growth: Any, may_give: Any, r_min: int) -> Any:
        return np.where(may_give & (growth == 0), np.maximum(request.ranks - r_min, 0), 0)

    monkeypatch.setattr(moves, "spare_units", whatever)
    _, events = constant_run(WORTHS[0])
    assert sum(map(moved, events[20:])) > 0


def test_the_least_important_dimensions_go_to_the_most_salient_expert() -> None:
    request = make_request(0, [3, 3, 3], [5, 5, 5], routing=[9, 1, 1], importance=[1, 1, 1])
    averages = np.zeros((3, 8))
    averages[:, :3] = [[1, 1, 1], [7, 2, 3], [4, 5, 6]]
    growth, cut = moves.exchange(request, averages, np.array([True] * 3), r_min=1, most=3)
    assert growth.tolist() == [3, 0, 0]
    assert np.argwhere(cut).tolist() == [[1, 1], [1, 2], [2, 0]]
    growth, cut = moves.exchange(request, averages, np.array([True, False, True]), 2, most=3)
    assert growth.tolist() == [1, 0, 0]
    assert np.argwhere(cut).tolist() == [[2, 0]]


def test_a_unit_goes_only_where_it_will_stay() -> None:
    """Expert 0 ends with all that is given; while it may take 1 unit, the next best gets none."""
    worth = {"routing": [64.0, 4.0, 4.0, 1.0, 1.0], "importance": [1.0] * 5}
    averages, everyone = np.ones((5, 16)), np.array([True] * 5)
    free = make_request(0, [4] * 5, [12] * 5, **worth)
    assert moves.exchange(free, averages, everyone, 1, most=20).growth.tolist() == [12, 0, 0, 0, 0]
    held = make_request(0, [4] * 5, [1] * 5, **worth)
    growth, cut = moves.exchange(held, averages, everyone, 1, most=20)
    assert growth.tolist() == [1, 0, 0, 0, 0]
    assert cut[3:].sum() == 1


def test_an_expert_that_gave_everything_starts_anew() -> None:
    engine = build(MOVING | {"r_min": 0, "r_init": 1, "r_target": 1, "r_max": 8}, {"a": 2})
    for _ in range(4):
        engine.observe("a", routing=[1.0, 0.0], importance=np.ones((2, 8)))
        event = engine.step()
    assert event is not None
    assert event.ranks["a"].tolist() == [2, 0]
    values = engine.state_dict()["layers"]["a"]
    assert values["importance"][1] == values["importance_count"][1] == 0
    assert not values["dimensions"][1].any()
    engine.observe("a", routing=[1.0, 0.0], importance=np.ones((2, 8)))
    assert engine.rank_importance("a").tolist() == [1.0, 0.0]


def test_move_works_with_for_training_and_grows_to_the_budget() -> None:
    config = AllocatorConfig.for_training(
        100, policy="move", r_init=2, r_target=4, r_max=8, move_share=0.5
    )
    assert (config.num_events, config.max_growth) == (8, 1)
    assert (config.cuts, config.ranks_change, config.mean_rank_ceiling) == (True, True, 4)
    engine = build(config.model_dump(), {"a": 6})
    totals, units = [], 0
    for step in range(config.growth_end):
        rng = np.random.default_rng(step)
        engine.observe("a", routing=[9, 5, 3, 1, 0, 0], importance=rng.random((6, 8)))
        if (event := engine.step()) is not None:
            totals.append(int(event.ranks["a"].sum()))
            units += moved(event)
    assert totals == [config.scheduled_total(6, k) for k in range(1, 9)]
    assert totals[-1] == 24
    assert units > 0


def test_move_needs_single_dimensions_and_no_callable() -> None:
    engine = build(MOVING, {"a": 2})
    with pytest.raises(StatisticError, match=r"policy 'move' needs that of every rank dimension"):
        engine.observe("a", routing=[1.0, 1.0], importance=[1.0, 1.0])
    with pytest.raises(LayoutError, match="policy 'move' cuts rank and cannot be combined"):
        AllocatorEngine(AllocatorConfig(**MOVING), policy=lambda request: request.limits)


def test_a_state_saved_before_these_fields_existed_loads() -> None:
    engine = build({"r_init": 2, "r_target": 4, "r_max": 8}, {"a": 2})
    state = engine.state_dict()
    for field in ("move_share", "r_min"):
        del state["config"][field]
    again = build({"r_init": 2, "r_target": 4, "r_max": 8}, {"a": 2})
    again.load_state_dict(state)
    assert_same_state(again.state_dict(), engine.state_dict())
    other = build({"r_init": 2, "r_target": 4, "r_max": 8, "r_min": 2}, {"a": 2})
    with pytest.raises(LayoutError, match=r"r_min 1 \(here 2\)"):
        other.load_state_dict(state)
