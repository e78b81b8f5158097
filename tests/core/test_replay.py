"""A replay of a run's recording decides what the run decided."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import (
    AllocationRequest,
    AllocatorConfig,
    LayoutError,
    PolicyError,
    StatisticError,
    UnknownLayerError,
)
from drlora_core.ema import IntArray
from drlora_core.policies import policy_name
from drlora_core.recording import Recording
from drlora_core.recording.format import BITS
from drlora_core.replay import first_difference, replay
from tests.core import recorded

ARRAYS = {"experts": np.array([[0.9, 0.1]] * 20)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy": "rescored"},
        {"policy": "proportional", "gamma": 0.3},
        {"policy": "random", "seed": 5},
        {"policy": "uniform"},
        {"policy": "prune", "r_init": 8},
        {"policy": "prune", "r_init": 6, "scope": "global"},
        {"policy": "prune", "r_init": 6, "r_min": 0},
        {"policy": "move", "r_init": 4, "move_share": 0.5},
        {"policy": "move", "r_min": 0, "importance_decay": 0.5, "move_share": 1.0},
        {"scope": "global", "max_growth": 2},
        {"use_importance": False},
        {"quota": 3},
    ],
)
def test_a_live_run_is_repeated_exactly(tmp_path: Path, changes: dict[str, Any]) -> None:
    engine, events = recorded.record(tmp_path / "run", **changes)
    again = replay(Recording.open(tmp_path / "run"))
    assert first_difference(events, again.events) is None
    for name in recorded.LAYERS:
        np.testing.assert_array_equal(again.final_ranks[name], engine.ranks(name))
        np.testing.assert_array_equal(again.engine.saliency(name), engine.saliency(name))
        assert again.trajectory(name).shape == (len(events) + 1, recorded.LAYERS[name])
    assert again.total_rank()[-1] == sum(ranks.sum() for ranks in again.final_ranks.values())
    assert again.steps == 20


def test_another_policy_decides_otherwise_and_it_is_named() -> None:
    recording = Recording.from_arrays(ARRAYS, ARRAYS)
    config = recorded.config()
    greedy, spread = replay(recording, config), replay(recording, config, policy=last_first)
    assert greedy.policy == "greedy"
    assert spread.policy == "last_first"
    assert greedy.final_ranks["experts"].tolist() == [6, 2]
    assert spread.final_ranks["experts"].tolist() == [2, 6]
    difference = first_difference(greedy.events, spread.events)
    assert difference == "step 8, layer 'experts', expert 0: rank 3 and 2"
    assert first_difference(greedy.events, greedy.events[:1]) == "3 events and 1"


class Balanced:
    """A policy object: it has no ``__name__``."""

    def __call__(self, request: AllocationRequest) -> IntArray:
        return np.zeros_like(request.ranks)


def test_a_policy_object_is_named_by_its_class() -> None:
    recording = Recording.from_arrays(ARRAYS, ARRAYS)
    assert replay(recording, recorded.config(), policy=Balanced()).policy == "Balanced"
    assert policy_name(Balanced()) == "Balanced"
    assert policy_name(last_first) == "last_first"


def last_first(request: AllocationRequest) -> IntArray:
    growth = np.zeros_like(request.ranks)
    growth[-1] = min(request.quota, request.limits[-1])
    return growth


def floats(request: AllocationRequest) -> IntArray:
    return np.zeros(request.ranks.size)  # type: ignore[return-value]


def overspends(request: AllocationRequest) -> IntArray:
    return np.minimum(request.limits, request.quota)


def mutates(request: AllocationRequest) -> IntArray:
    request.ranks[0] = 1
    return np.zeros_like(request.ranks)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (floats, "'floats' at step 8, layer 'experts' returned float64"),
        (overspends, "'overspends' at step 8, layer 'experts' spent"),
        (mutates, "'mutates' at step 8, layer 'experts' failed: ValueError"),
    ],
)
def test_a_policy_that_breaks_the_contract_is_named(policy: object, message: str) -> None:
    recording = Recording.from_arrays(ARRAYS, ARRAYS)
    with pytest.raises(PolicyError, match=message):
        replay(recording, recorded.config(), policy=policy)  # type: ignore[arg-type]


def test_what_a_replay_needs_and_does_not_have_is_named(tmp_path: Path) -> None:
    recording = Recording.from_arrays(ARRAYS)
    with pytest.raises(LayoutError, match="no configuration of its own"):
        replay(recording)
    with pytest.raises(StatisticError, match="layer 'experts', step 1: importance is missing"):
        replay(recording, recorded.config())
    assert len(replay(recording, recorded.config(use_importance=False)).events) == 3
    with pytest.raises(LayoutError, match="importance of every rank dimension"):
        replay(recording, recorded.config(policy="prune", r_init=8))
    with pytest.raises(UnknownLayerError, match="did you mean 'experts'"):
        replay(recording, recorded.config(use_importance=False)).trajectory("expert")


def test_prune_is_replayed_by_the_identity_of_dimensions(tmp_path: Path) -> None:
    recorded.record(tmp_path / "run", policy="prune", r_init=8)
    recording = Recording.open(tmp_path / "run")
    assert recording.dimensions is not None
    with pytest.raises(LayoutError, match="8 rank dimensions, r_max is 9"):
        replay(recording, recorded.config(policy="prune", r_init=8, r_max=9))
    with pytest.raises(StatisticError, match=r"step 9: dimension . of expert . was not recorded"):
        replay(recording, recorded.config(policy="prune", r_init=8, r_target=6))
    greedy = replay(recording, recorded.config())
    assert greedy.total_rank()[-1] == 10 * 4


def test_a_step_without_importance_is_named_in_a_replay_that_cuts(tmp_path: Path) -> None:
    recorded.record(tmp_path / "run", steps=5, policy="prune", r_init=8)
    recording = Recording.open(tmp_path / "run")
    presence = recording.presence.copy()
    presence[2, 1] -= BITS["importance"]
    with pytest.raises(StatisticError, match="layer 'second', step 3: importance is missing"):
        replay(dataclasses.replace(recording, presence=presence))


def test_move_is_replayed_only_with_the_dimensions_of_its_run(tmp_path: Path) -> None:
    moving = {"policy": "move", "r_init": 4, "move_share": 1.0}
    _, events = recorded.record(tmp_path / "run", **moving)
    assert sum(cut.sum() for event in events for cut in event.cut.values()) > 0
    recording = Recording.open(tmp_path / "run")
    with pytest.raises(StatisticError, match="was not recorded: the run did not have it, but this"):
        replay(recording, recorded.config(**moving, gamma=0.0))
    with pytest.raises(LayoutError, match="than policy 'prune' needs: it used policy 'move'"):
        replay(recording, recorded.config(policy="prune", r_init=4))
    with pytest.raises(LayoutError, match="needs the importance of every rank dimension"):
        replay(Recording.from_arrays(ARRAYS, ARRAYS), recorded.config(**moving))
    assert replay(recording, recorded.config()).total_rank()[-1] == 10 * 4


def test_prune_on_arrays_keeps_the_important_dimensions() -> None:
    importance = np.ones((20, 2, 8))
    importance[:, 0, ::2] = 5.0  # every other dimension of expert 0 matters
    recording = Recording.from_arrays(
        ARRAYS, {"experts": importance.mean(axis=2)}, dimensions={"experts": importance}
    )
    result = replay(recording, recorded.config(policy="prune", r_init=8, r_target=4))
    kept = np.ones((2, 8), dtype=bool)
    order = np.tile(np.arange(8), (2, 1))
    for event in result.events:
        for expert, cut in enumerate(event.cut["experts"]):
            kept[expert, order[expert][cut]] = False
            order[expert] = np.concatenate([order[expert][~cut], order[expert][cut]])
    assert kept[0, ::2].all()
    assert kept.sum() == 8


def test_experts_without_rank_are_replayed_with_their_share() -> None:
    """A run from rank 0 measured no importance of theirs; another configuration needs one."""
    config = AllocatorConfig(
        r_init=0, r_target=1, r_max=4, warmup_steps=0, growth_interval=1, growth_end=2
    )
    f, g = [[0.6, 0.3, 0.1]] * 2, [[0.0, 0.0, 0.0], [4.0, 2.0, 0.0]]
    ranks = [[0, 0, 0], [1, 1, 0]]
    recording = Recording.from_arrays({"a": f}, {"a": g}, ranks={"a": ranks}, config=config)
    other = AllocatorConfig(r_init=1, r_target=2, warmup_steps=1, growth_interval=5, growth_end=6)
    engine = replay(recording, other).engine  # its event comes later
    first, second = np.array([0.6, 0.3, 0.1]), np.array([4.0, 2.0, 6.0 / 0.9 * 0.1])
    np.testing.assert_allclose(engine.rank_importance("a"), (0.9 * first + second) / 1.9)
    unrouted = Recording.from_arrays(None, {"a": g}, ranks={"a": ranks}, config=config)
    engine = replay(unrouted, other.model_copy(update={"use_routing": False})).engine
    first, second = np.ones(3), np.array([4.0, 2.0, 3.0])  # f is 1, so the share is the mean
    np.testing.assert_allclose(engine.rank_importance("a"), (0.9 * first + second) / 1.9)
