"""Layers that are added with given ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import AllocatorConfig, AllocatorEngine, LayoutError
from drlora_core.diagnostics.subject import from_run
from drlora_core.recording import Recording
from drlora_core.replay import first_difference, replay
from drlora_core.runs import from_recording


def test_a_layer_starts_with_given_ranks() -> None:
    """They count against the budget: the only event places what is left."""
    config = AllocatorConfig(
        r_init=1, r_target=2, r_max=4, warmup_steps=0, growth_interval=1, growth_end=1
    )
    engine = AllocatorEngine(config)
    engine.add_layer("experts", 3, ranks=[1, 3, 1])
    engine.observe("experts", routing=[0.9, 0.1, 0.0], importance=[1.0, 1.0, 1.0])
    event = engine.step()
    assert event is not None
    assert event.deltas["experts"].tolist() == [1, 0, 0]
    restored = AllocatorEngine(config)
    restored.load_state_dict(engine.state_dict())
    assert restored.ranks("experts").tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, [1, 1], r"integers of shape \(3,\), got int64\(2,\)"),
        ({}, [1.0, 1.0, 1.0], r"got float64\(3,\)"),
        ({}, [0, 1, 1], r"lie in 0\.\.1, not 1\.\.4"),
        ({}, [1, 1, 5], r"lie in 1\.\.5, not 1\.\.4"),
        ({}, [4, 2, 1], "sum to 7, above the budget of 6"),
        ({"policy": "prune", "r_init": 3}, [3, 3, 2], "starts every expert at r_init = 3"),
    ],
)
def test_impossible_starting_ranks_are_refused(
    changes: dict[str, Any], ranks: list[int], message: str
) -> None:
    fields = {"r_init": 1, "r_target": 2, "r_max": 4, "growth_end": 1, "growth_interval": 1}
    engine = AllocatorEngine(AllocatorConfig(**{"warmup_steps": 0, **fields, **changes}))
    with pytest.raises(LayoutError, match=message):
        engine.add_layer("experts", 3, ranks=ranks)
    assert engine.layer_names == ()


def test_a_quota_that_falls_short_counts_from_the_given_ranks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fields = {"r_init": 0, "r_target": 2, "r_max": 4, "growth_end": 2, "growth_interval": 1}
    engine = AllocatorEngine(AllocatorConfig(**{"warmup_steps": 0, "quota": 1, **fields}))
    with caplog.at_level("WARNING"):
        engine.add_layer("enough", 3, ranks=[0, 4, 0])
        engine.add_layer("short", 3, ranks=[0, 3, 0])
    assert "enough" not in caplog.text
    assert "quota 1 x 2 events = 2 < 3 needed; total rank will end at 5 of 6" in caplog.text


def test_a_recording_starts_where_its_run_did(tmp_path: Path) -> None:
    config = AllocatorConfig(
        r_init=0, r_target=2, r_max=4, warmup_steps=0, growth_interval=2, growth_end=4
    )
    engine = AllocatorEngine(config)
    engine.add_layer("experts", 3, ranks=[0, 3, 0])
    engine.record_to(tmp_path / "recording")
    for phi in ([0.5, 0.2, 0.3], [0.6, 0.1, 0.3], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]):
        engine.observe("experts", routing=phi, importance=[1.0, 2.0, 3.0])
        engine.step()
    engine.record_to(None)
    recording = Recording.open(tmp_path / "recording")
    repeated = replay(recording)
    assert first_difference(recording.events, repeated.events) is None
    assert repeated.trajectory("experts")[0].tolist() == [0, 3, 0]
    assert repeated.final_ranks["experts"].tolist() == engine.ranks("experts").tolist()
    assert from_run(from_recording(recording)).growth("experts").sum() == 3
    other = replay(recording, config.model_copy(update={"gamma": 0.5}))
    assert other.trajectory("experts")[0].tolist() == [0, 0, 0]


def test_what_is_given_of_experts_without_rank_is_not_recorded(tmp_path: Path) -> None:
    """A mean over no dimension is NaN in most loops; the recording must open again."""
    config = AllocatorConfig(
        r_init=0, r_target=1, r_max=2, warmup_steps=0, growth_interval=2, growth_end=6
    )
    engine = AllocatorEngine(config)
    engine.add_layer("experts", 3)
    engine.record_to(tmp_path / "recording")
    for _ in range(6):
        known = engine.ranks("experts") > 0
        engine.observe(
            "experts", routing=[0.5, 0.3, 0.2], importance=np.where(known, [1.0, 2.0, 3.0], np.nan)
        )
        engine.step()
    engine.record_to(None)
    recording = Recording.open(tmp_path / "recording")
    assert recording.importance[0].tolist() == [0.0, 0.0, 0.0]
    assert first_difference(recording.events, replay(recording).events) is None


@pytest.mark.parametrize(
    ("ranks", "warning"),
    [([0, 6, 0], ""), ([0, 2, 0], "= 2 < 4 needed; total rank will end at 4 of 6")],
)
def test_a_shortfall_counts_the_ranks_that_are_given(
    ranks: list[int], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = AllocatorConfig(
        r_init=0, r_target=2, r_max=8, warmup_steps=0, growth_interval=1, growth_end=2, quota=1
    )
    with caplog.at_level(logging.WARNING):
        AllocatorEngine(config).add_layer("experts", 3, ranks=ranks)
    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)


def test_a_measured_expert_that_is_not_visited_any_more_leaves_saliency_finite() -> None:
    config = AllocatorConfig(
        r_init=0, r_target=2, r_max=4, routing_decay=0.0001, importance_decay=0.999
    )
    engine = AllocatorEngine(config)
    engine.add_layer("experts", 3, ranks=[2, 0, 0])
    engine.observe("experts", routing=[1.0, 0.0, 0.0], importance=[1e9, 0.0, 0.0])
    engine.step()
    for _ in range(82):
        engine.observe("experts", routing=[0.0, 1.0, 0.0], importance=[0.0, 0.0, 0.0])
        engine.step()
        assert np.isfinite(engine.saliency("experts")).all()


@pytest.mark.parametrize("policy", ["uniform", "prune", "greedy"])
def test_only_policies_with_a_quota_can_fall_short(
    policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    start = 4 if policy == "prune" else 1
    config = AllocatorConfig(
        **{"r_init": start, "r_target": 2, "r_max": 4, "policy": policy, "quota": 1},
        **{"warmup_steps": 0, "growth_interval": 1, "growth_end": 1},
    )
    engine = AllocatorEngine(config)
    ranks = [1, 1, 1, 2] if policy == "uniform" else [start] * 4
    engine.add_layer("a", 4, ranks=ranks)  # those of prune are above the budget that it ends with
    assert engine.ranks("a").tolist() == ranks
    assert bool(caplog.records) is (policy == "greedy")
    assert all("layer 'a'" in record.getMessage() for record in caplog.records)
