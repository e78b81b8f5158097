"""Every diagnostic is provoked by a run that has the failure, and silent on one that has not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from drlora_core import AllocationRequest, AllocatorConfig, LayoutError
from drlora_core.diagnostics import CHECKS, Diagnosis, Finding, Thresholds, diagnose
from drlora_core.diagnostics.healthy import HEALTHY
from drlora_core.ema import IntArray
from drlora_core.recording import Recording
from drlora_core.runs import from_recording, open_run
from tests.core import recorded

LAYERS, EXPERTS, STEPS = 3, 16, 40
Array = NDArray[np.float64]


def settings(**changes: object) -> AllocatorConfig:
    """Eight events after steps 8, 12, ..., 36; a healthy configuration on healthy statistics."""
    healthy = {
        "growth_end": 36,
        "r_target": 6,
        "r_max": 12,
        "policy": "rescored",
        "gamma": 1.0,
    }
    return recorded.config(**(healthy | changes))


def levels(seed: int = 0) -> Array:
    """Return what experts stand for, [L, N]: clearly different from each other, all above 0."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.geomspace(0.05, 1.0, EXPERTS)) for _ in range(LAYERS)])


def noisy(level: Array, amount: float = 0.1, seed: int = 1) -> Array:
    """Samples around a level, [T, L, N]."""
    rng = np.random.default_rng(seed)
    return np.asarray(level * rng.lognormal(0.0, amount, size=(STEPS, *level.shape)))


def make(routing: Array | None = None, importance: Array | None = None) -> Recording:
    """Return a healthy recording, but for what is given, [T, L, N]."""
    routing = noisy(levels()) if routing is None else routing
    importance = noisy(np.sqrt(levels()), seed=2) if importance is None else importance
    names = [f"layer {index}" for index in range(routing.shape[1])]
    return Recording.from_arrays(
        {name: routing[:, index] for index, name in enumerate(names)},
        {name: importance[:, index] for index, name in enumerate(names)},
    )


def find(result: Diagnosis, name: str) -> Finding | None:
    return next((finding for finding in result.findings if finding.name == name), None)


def test_a_healthy_run_has_no_findings() -> None:
    result = diagnose(make(), settings())
    assert result.findings == ()
    assert result.not_checked == {"monopolised_budget": "scope 'layer' gives every layer the same"}
    everywhere = diagnose(make(), settings(scope="global"))
    assert everywhere.findings == ()
    assert everywhere.not_checked == {}


def saturated() -> Diagnosis:
    return diagnose(make(noisy(levels() ** 4)), settings(gamma=0.0))


def even() -> Diagnosis:
    return diagnose(make(), settings(gamma=20.0))


def first_layer_only() -> Diagnosis:
    routing = noisy(levels())
    config = settings(scope="global", layer_floor=0.0, policy="greedy", r_max=18)
    skewed = 1.0 + 0.001 * routing  # in the other layers all experts are near their mean,
    skewed[:, 0, :6] = 0.0  # in the first ten are above it
    return diagnose(make(skewed, np.ones_like(skewed)), config)


def no_room() -> Diagnosis:
    return diagnose(make(), settings(warmup_steps=28, quota=40, max_growth=1))


def too_early() -> Diagnosis:
    importance = noisy(np.sqrt(levels()), seed=2)
    importance[:8] = noisy(np.ones_like(levels()), 1.0, seed=3)[:8]
    return diagnose(make(importance=importance), settings())


def unrouted() -> Diagnosis:
    routing = noisy(levels())
    routing[:, 1, [3, 5]] = 0.0
    return diagnose(make(routing), settings())


def abandoned() -> Diagnosis:
    routing = noisy(levels())
    routing[-10:] = routing[-10:, :, ::-1] * np.where(levels() > 0.3, 0.05, 1.0)
    return diagnose(make(routing), settings())


def flat_routing() -> Diagnosis:
    return diagnose(make(np.ones((STEPS, LAYERS, EXPERTS))), settings())


def noise_as_routing() -> Diagnosis:
    return diagnose(make(noisy(np.ones_like(levels()), 1.0)), settings())


def flat_importance() -> Diagnosis:
    return diagnose(make(importance=np.ones((STEPS, LAYERS, EXPERTS))), settings())


def noise_as_importance() -> Diagnosis:
    return diagnose(make(importance=noisy(np.ones_like(levels()), 1.0, seed=5)), settings())


def unrelated() -> Diagnosis:
    return diagnose(make(importance=noisy(levels(seed=8), seed=2)), settings())


@pytest.mark.parametrize(
    ("name", "run", "evidence"),
    [
        ("saturated_growth", saturated, "share_of_full_experts"),
        ("even_growth", even, "distance_from_even"),
        ("monopolised_budget", first_layer_only, "growth_over_even_share"),
        ("unplaced_quota", no_room, "units"),
        ("unreliable_first_event", too_early, "rank_correlation"),
        ("never_routed", unrouted, "experts"),
        ("lost_traffic", abandoned, "share"),
        ("uninformative_routing", flat_routing, "coefficient_of_variation"),
        ("uninformative_routing", noise_as_routing, "rank_correlation"),
        ("uninformative_importance", flat_importance, "coefficient_of_variation"),
        ("uninformative_importance", noise_as_importance, "rank_correlation"),
        ("unrelated_signals", unrelated, "rank_correlation"),
    ],
)
def test_a_failure_is_found(name: str, run: Callable[[], Diagnosis], evidence: str) -> None:
    result = run()
    finding = find(result, name)
    assert finding is not None, str(result)
    assert evidence in finding.evidence
    assert finding.advice
    assert f"[{name}]" in str(result)
    assert finding.name in CHECKS


def test_the_evidence_is_right() -> None:
    unused = find(unrouted(), "never_routed")
    assert unused is not None
    assert unused.evidence == {"experts": {"layer 1": [3, 5]}, "share": 2 / 48}
    monopoly = find(first_layer_only(), "monopolised_budget")
    assert monopoly is not None
    assert max(monopoly.evidence["growth_over_even_share"].values()) >= 2.0
    left = find(no_room(), "unplaced_quota")
    assert left is not None
    assert left.evidence["units"] > 0


def test_saturation_by_the_greedy_walk_itself_is_only_noted() -> None:
    finding = find(
        diagnose(make(), settings(policy="greedy", r_max=10, growth_end=12)), "saturated_growth"
    )
    assert finding is not None
    assert finding.severity == "note"
    assert "max_growth" in finding.advice


def lazy(request: AllocationRequest) -> IntArray:
    """A policy that places nothing after step 12."""
    growth = np.zeros_like(request.ranks)
    growth[0] = min(request.quota, request.limits[0], 1) if request.step <= 12 else 0
    return growth


def test_stagnant_growth_is_found_in_a_live_run(tmp_path: Path) -> None:
    engine = recorded.build(settings(r_max=8), policy=lazy)
    engine.record_to(tmp_path / "run")
    recorded.drive(engine, 40)
    engine.record_to(None)
    stuck = find(diagnose(Recording.open(tmp_path / "run")), "stagnant_growth")
    assert stuck is not None
    assert stuck.evidence["units_left"] == {"first": 6 * 4 - 2, "second": 4 * 4 - 2}
    recorded.record(tmp_path / "healthy", steps=40)
    healthy = diagnose(Recording.open(tmp_path / "healthy"))
    assert find(healthy, "stagnant_growth") is None
    assert "stagnant_growth" not in healthy.not_checked


def test_a_live_engine_is_diagnosed_without_its_past() -> None:
    engine = recorded.build(settings(), {"a": 16})
    level = np.geomspace(0.05, 1.0, 16)
    for _ in range(40):
        engine.observe("a", routing=np.where(level < 0.1, 0.0, level), importance=np.ones(16))
        engine.step()
    result = diagnose(engine)
    names = {finding.name for finding in result.findings}
    assert {"never_routed", "uninformative_importance"} <= names
    assert {"unreliable_first_event", "lost_traffic", "stagnant_growth"} <= set(result.not_checked)


def test_what_cannot_be_judged_yet_is_said() -> None:
    routing = {"a": np.ones((4, 8))}
    result = diagnose(Recording.from_arrays(routing), settings(use_importance=False))
    assert "0% of the growth is placed" in result.not_checked["saturated_growth"]
    assert "no growth event yet" in result.not_checked["lost_traffic"]
    assert set(result.not_checked) <= set(CHECKS)
    uniform = diagnose(make(), settings(policy="uniform"))
    assert "does not grow" in uniform.not_checked["even_growth"]


def test_nothing_is_called_good_before_it_can_be_told(tmp_path: Path) -> None:
    later = {"warmup_steps": STEPS, "growth_end": STEPS + 12}
    early = diagnose(make(), settings(**later, growth_interval=4)).not_checked
    assert early["stagnant_growth"] == "fewer than 2 events"
    assert early["unplaced_quota"] == "there was no growth event yet"
    assert early["unreliable_first_event"] == f"the first event, at step {STEPS + 4}, is ahead"
    recorded.record(tmp_path / "static", r_init=4)
    static = diagnose(Recording.open(tmp_path / "static"))
    for name in ("stagnant_growth", "unplaced_quota", "even_growth"):
        assert static.not_checked[name] == "the budget is spent at the start: nothing grows"
    flat = diagnose(make(importance=np.ones((STEPS, LAYERS, EXPERTS))), settings())
    reason = flat.not_checked["unreliable_first_event"]
    assert reason == "importance is constant or was not observed"


def test_a_run_is_diagnosed_as_its_recording(tmp_path: Path) -> None:
    recorded.record(tmp_path / "run")
    assert diagnose(open_run(tmp_path / "run")) == diagnose(Recording.open(tmp_path / "run"))
    with pytest.raises(LayoutError, match="this run has its own configuration"):
        diagnose(open_run(tmp_path / "run"), settings())


def test_a_run_that_moves_rank_is_judged_by_its_events(tmp_path: Path) -> None:
    changes = {"policy": "move", "r_init": 4, "move_share": 1.0}
    recorded.record(tmp_path / "half", steps=8, **changes)
    early = diagnose(Recording.open(tmp_path / "half"))
    assert early.not_checked["even_growth"] == "1 of 3 events are past; this check needs 50%"
    recorded.record(tmp_path / "whole", **changes)
    whole = diagnose(Recording.open(tmp_path / "whole"))
    assert "even_growth" not in whole.not_checked
    assert "policy 'move' cuts ranks too" in whole.not_checked["saturated_growth"]
    recorded.record(tmp_path / "still", **changes | {"move_share": 0.0})
    assert find(diagnose(Recording.open(tmp_path / "still")), "even_growth") is not None


def test_layers_without_rank_say_nothing_about_evenness() -> None:
    """With r_init=0 and scope global, a layer may get nothing at all."""
    flat = np.where(np.arange(LAYERS)[:, None] == 0, 1.0, 0.0) * np.ones(EXPERTS)
    changes = {"scope": "global", "layer_floor": 0.0, "r_init": 0, "r_target": 1}
    result = diagnose(make(noisy(flat, 0.0)), settings(**changes, use_importance=False))
    finding = find(result, "even_growth")
    assert finding is not None
    assert finding.evidence["distance_from_even"] == {"layer 0": 0.0, "layer 1": 0.0}
    engine = recorded.build(settings(policy="move", r_init=0))
    for _ in range(40):  # no event spends anything before a sample
        for name in engine.layer_names:
            engine.skip(name)
        engine.step()
    assert diagnose(engine).not_checked["even_growth"] == "no expert has rank"


def test_thresholds_can_be_changed() -> None:
    strict = Thresholds(even_distance=1.0)
    assert find(diagnose(make(), settings(), thresholds=strict), "even_growth") is not None


def test_nothing_to_diagnose_is_refused() -> None:
    engine = recorded.build(settings(), {"a": 2})
    with pytest.raises(LayoutError, match="no configuration of its own"):
        diagnose(make())
    with pytest.raises(LayoutError, match="config is for recordings"):
        diagnose(engine, settings())
    with pytest.raises(LayoutError, match="not a dict"):
        diagnose({})  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="no layers"):
        diagnose(type(engine)(settings()))


def test_a_diagnosis_is_plain_data() -> None:
    values = saturated().to_dict()
    assert values["findings"][0]["name"] == "saturated_growth"
    assert set(values) == {"findings", "passed", "not_checked"}


def test_every_check_is_found_good_or_bad_or_not_made() -> None:
    result = saturated()
    found = {finding.name for finding in result.findings}
    assert found
    assert result.passed
    assert result.not_checked
    assert sorted([*found, *result.passed, *result.not_checked]) == sorted(CHECKS)
    assert set(HEALTHY) == set(CHECKS)
    healthy = diagnose(make(), settings())
    assert len(healthy.passed) == len(CHECKS) - 1
    assert "good: saturated_growth, even_growth" in str(healthy)


def test_starting_ranks_that_spend_the_budget_leave_no_growth_to_judge() -> None:
    """As where ranks of an earlier run are given to the layers."""
    run = from_recording(make(), settings())
    budget = {name: np.full(size, settings().r_target) for name, size in run.layers.items()}
    result = diagnose(dataclasses.replace(run, starts=budget, events=()))
    assert "the budget is spent at the start" in result.not_checked["even_growth"]
