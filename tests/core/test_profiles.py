"""Starting ranks from a profile: means, starting policies, and what engines do with them."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core import AllocatorConfig, AllocatorEngine, LayoutError, Recording
from drlora_core import profiles as module
from drlora_core.policies import AllocationRequest
from drlora_core.profiles import gradient, mean_statistics, profile, sieve, starting_ranks
from drlora_core.testing import check_policy, make_request

STATIC: dict[str, Any] = {"r_init": 0, "r_target": 4, "r_max": 16, "policy": "uniform"}
GROWING: dict[str, Any] = {
    **STATIC, "policy": "greedy", "warmup_steps": 0, "growth_interval": 1, "growth_end": 2,
}  # fmt: skip
F, G = [0.1, 0.4, 0.3, 0.2], [3.0, 1.0, 0.0, 0.0]


def build(config: dict[str, Any], policy: Any = "sieve", g: Any = G) -> AllocatorEngine:
    return AllocatorEngine.from_profile(AllocatorConfig(**config), {"a": (F, g)}, policy)


def test_means_are_weighted_by_tokens_where_they_are_known(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    routing, importance = ({"a": rng.random((5, 3)), "b": rng.random((5, 3))} for _ in range(2))
    tokens = np.array([5, 1, 2, 9, 3])
    recording = Recording.from_arrays(routing, importance, tokens=tokens)
    presence = recording.presence.copy()
    presence[2, 1] = 0  # layer b was skipped
    arrays = {k: v.copy() for k, v in vars(recording).items() if isinstance(v, np.ndarray)}
    for name in ("routing", "importance"):
        arrays[name][2, 3:] = np.nan
    unknown = arrays["tokens"].copy()
    unknown[0, 0] = -1
    arrays["presence"] = presence
    weighted = Recording(layers=recording.layers, **arrays)
    weighted.save(tmp_path / "recording")
    for source in (weighted, tmp_path / "recording", str(tmp_path / "recording")):
        found = mean_statistics(source)
        for position, values in enumerate((routing, importance)):
            for layer, steps in (("a", [0, 1, 2, 3, 4]), ("b", [0, 1, 3, 4])):
                total = sum(tokens[t] * values[layer][t] for t in steps)
                expected = total / sum(tokens[t] for t in steps)
                np.testing.assert_allclose(found[layer][position], expected, rtol=1e-12)
    plain = mean_statistics(Recording(layers=recording.layers, **{**arrays, "tokens": unknown}))
    np.testing.assert_allclose(plain["a"][0], routing["a"].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(plain["b"][0], found["b"][0], rtol=1e-12)


@pytest.mark.parametrize(
    ("policy", "ranks"),
    [
        ("sieve", [0, 16, 0, 0]),
        (functools.partial(sieve, fraction=0.5), [0, 8, 8, 0]),
        (functools.partial(sieve, fraction=0.75), [0, 5, 5, 5]),
        (functools.partial(sieve, fraction=1.0), [4, 4, 4, 4]),
        (functools.partial(sieve, fraction=0.01), [0, 16, 0, 0]),
        ("profile", [2, 6, 5, 3]),  # 1.6, 6.4, 4.8, 3.2
        ("gradient", [12, 4, 0, 0]),
        (lambda request: np.array([0, 0, 0, request.quota - 1]), [0, 0, 0, 15]),
    ],
)
def test_starting_policies(policy: Any, ranks: list[int]) -> None:
    engine = build(STATIC, policy)
    assert engine.ranks("a").tolist() == ranks
    again = AllocatorEngine(engine.config)
    again.load_state_dict(engine.state_dict())
    assert again.ranks("a").tolist() == ranks
    engine.observe("a", routing=F, importance=G)
    assert engine.step() is None


def slow_proportion(scores: list[float], quota: int, r_max: int) -> list[int]:
    """Largest remainder by loops; full experts leave, and the rest share anew."""
    ranks, active = [0] * len(scores), set(range(len(scores)))
    while True:
        left = quota - sum(ranks[i] for i in range(len(scores)) if i not in active)
        total = sum(scores[i] for i in active)
        if not active:
            return ranks
        shares = {i: left * (scores[i] / total if total else 1 / len(active)) for i in active}
        full = [i for i in active if shares[i] >= r_max]
        if not full:
            break
        for i in full:
            ranks[i] = r_max
            active.discard(i)
    for i in active:
        ranks[i] = int(shares[i])
    by_remainder = sorted(active, key=lambda i: (-round(shares[i] - int(shares[i]), 9), i))
    for i in by_remainder[: left - sum(ranks[i] for i in active)]:
        ranks[i] += 1
    return ranks


def slow_sieve(scores: list[float], quota: int, fraction: float) -> list[int]:
    count = max(round(fraction * len(scores)), 1)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return [quota // count if i in best else 0 for i in range(len(scores))]


def compare() -> None:
    """Many random profiles, with ties and zeros, against the loops."""
    rng = np.random.default_rng(1)
    for number, size in itertools.product(range(30), (1, 2, 5, 8)):
        f, g = (rng.integers(0, 6, size) / 8.0 for _ in range(2))
        r_target, room = int(rng.integers(1, 5)), int(rng.integers(0, 9))
        r_max, quota = r_target + room, size * r_target
        config = AllocatorConfig(r_init=0, r_target=r_target, r_max=r_max, policy="uniform")
        statistics = {"a": (f, g)}
        for policy, scores in ((module.profile, f), (module.gradient, g)):
            found = starting_ranks(config, statistics, policy)["a"].tolist()
            assert found == slow_proportion(scores.tolist(), quota, r_max), number
        roomy = config.model_copy(update={"r_max": quota})
        fraction = float(rng.uniform(0.1, 1.0))
        chosen = functools.partial(module.sieve, fraction=fraction)
        found = starting_ranks(roomy, statistics, chosen)["a"].tolist()
        assert found == slow_sieve(f.tolist(), quota, fraction)


def test_starting_policies_against_slow_references() -> None:
    compare()


def by_importance(request: AllocationRequest) -> Any:
    return gradient(request)


def half_of_it(request: AllocationRequest) -> Any:
    return profile(request) // 2


def least_used(request: AllocationRequest, *, fraction: float = 0.25) -> Any:
    count = max(round(fraction * request.ranks.size), 1)
    ranks = np.zeros_like(request.ranks)
    ranks[np.argsort(request.routing, kind="stable")[:count]] = request.quota // count
    return ranks


def unstable(request: AllocationRequest, *, fraction: float = 0.25) -> Any:
    count = max(round(fraction * request.ranks.size), 1)
    ranks = np.zeros_like(request.ranks)
    ranks[np.argsort(request.routing, kind="stable")[::-1][:count]] = request.quota // count
    return ranks


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("profile", by_importance),
        ("profile", half_of_it),
        ("gradient", profile),
        ("sieve", least_used),
        ("sieve", unstable),
    ],
)
def test_broken_starting_policies_are_found(
    name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError, match=r"assert \["):
        compare()


@pytest.mark.parametrize("policy", [profile, gradient])
def test_the_contract_of_policies(policy: Any) -> None:
    check_policy(policy, examples=60)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_growth_fills_what_the_start_left_over(scope: str) -> None:
    """r_init=0: the budget is met at the last event, and never exceeded."""
    config = AllocatorConfig(**{**GROWING, "scope": scope})
    engine = AllocatorEngine.from_profile(
        config, {"a": (F, None), "b": (F, None)}, functools.partial(sieve, fraction=0.75)
    )
    for _ in range(2):
        for name in ("a", "b"):
            engine.observe(name, routing=F, importance=[1.0] * 4)
        assert engine.step() is not None
    assert sum(engine.ranks(name).sum() for name in ("a", "b")) == 32
    for name in ("a", "b"):
        assert scope == "global" or engine.ranks(name).sum() == 16
        assert (engine.ranks(name) >= [0, 5, 5, 5]).all()
    again = AllocatorEngine(config)
    again.load_state_dict(engine.state_dict())


@pytest.mark.parametrize(
    ("changes", "policy", "g", "text"),
    [
        ({"r_max": 8}, "sieve", G, "gives 1 of 4 experts rank 16, above r_max 8; use r_max >= 16"),
        ({"r_max": 8}, "sieve", G, "or functools.partial(sieve, fraction=0.5) or more"),
        ({}, functools.partial(sieve, fraction=0), G, "fraction is 0; accepted: above 0, up to 1"),
        ({}, "gradient", None, "'gradient' at the start, layer 'a': the profile"),
        ({}, "gradient", None, "the profile holds no importance, which this policy needs"),
        ({}, "seive", G, "no starting policy 'seive'; did you mean 'sieve'?"),
        ({}, "greedy", G, "no starting policy 'greedy'; "),
        ({}, 7, G, "policy must be a name (sieve, profile, gradient) or a callable"),
        ({}, lambda r: r.limits, G, "spent 64 units of a quota of 16"),
        ({}, lambda r: r.routing, G, "returned float64; return an integer array"),
        ({**GROWING, "r_init": 2}, "sieve", G, "gives an expert rank 0, below r_init 2; use r_i"),
        ({"policy": "prune", "r_init": 8}, "sieve", G, "policy 'prune' starts every expert at r"),
        ({}, "sieve", [1.0], "f has shape (4,) and g (1,)"),
        ({}, "sieve", [-1.0] * 4, "layer 'a': g of expert 0 is -1.0; accepted: finite"),
        ({}, "sieve", "text", "layer 'a': not a pair of arrays"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], policy: Any, g: Any, text: str
) -> None:
    with pytest.raises(ValueError, match=r"'a'|policy") as caught:
        build({**STATIC, **changes}, policy, g)
    assert text in str(caught.value)


def test_the_fraction_in_the_error_is_the_smallest_that_fits() -> None:
    for size, r_target, r_max in itertools.product((3, 8, 60), (1, 4), (4, 5, 32)):
        request = make_request(size * r_target, [0] * size, [r_max] * size)
        wanted = next(c for c in range(1, size + 1) if request.quota // c <= r_max)
        if wanted == 1:
            continue
        with pytest.raises(ValueError, match=r"fraction=") as caught:
            sieve(request, fraction=0.01)
        share = float(str(caught.value).split("fraction=")[1].split(")")[0])
        assert np.count_nonzero(sieve(request, fraction=share)) == wanted


@pytest.mark.parametrize("statistics", [{}, 3, None])
def test_what_is_no_profile_is_refused(statistics: Any) -> None:
    with pytest.raises(ValueError, match=r"no layers|a Recording, the path of one"):
        AllocatorEngine.from_profile(AllocatorConfig(**STATIC), statistics)


def test_a_profile_of_routing_alone() -> None:
    for policy in ("sieve", "profile"):
        assert build(STATIC, policy, None).ranks("a").sum() == 16


def test_ranks_from_zero_are_for_policy_uniform() -> None:
    """Growing policies start at r_init at least, in an engine and in its state."""
    engine = build(STATIC)
    state = engine.state_dict()
    for policy in ("greedy", "uniform"):
        other = AllocatorConfig(**{**GROWING, "policy": policy, "r_init": 1})
        mine = {**state, "config": other.model_dump(mode="json")}
        if policy == "uniform":
            AllocatorEngine(other).load_state_dict(mine)
            continue
        with pytest.raises(ValueError, match=r"ranks lie in 0\.\.16, not 1\.\.16"):
            AllocatorEngine(other).load_state_dict(mine)


def test_importance_of_steps_without_rank_is_the_share_of_f() -> None:
    """Four experts alike, of which two had rank from the second step on."""
    routing, importance = np.full((4, 4), 0.25), np.full((4, 4), 3.0)
    ranks = np.ones((4, 4), dtype=np.int64)
    ranks[0, :2] = 0
    importance[0, :2] = 0.0
    recording = Recording.from_arrays({"a": routing}, {"a": importance}, ranks={"a": ranks})
    f, g = mean_statistics(recording)["a"]
    np.testing.assert_allclose(g, 3.0)
    np.testing.assert_allclose(f, 0.25)


def test_move_starts_from_a_profile_at_its_full_budget() -> None:
    fields = {"policy": "move", "r_init": 2, "r_target": 2, "r_max": 8, "r_min": 0}
    engine = AllocatorEngine.from_profile(AllocatorConfig(**fields), {"a": ([0.1, 0.9], None)})
    assert engine.ranks("a").tolist() == [0, 4]
    with pytest.raises(LayoutError, match="rank 0, below r_min 1; use r_min=0"):
        AllocatorEngine.from_profile(
            AllocatorConfig(**{**fields, "r_min": 1}), {"a": ([0.1, 0.9], None)}
        )
