"""Write an allocation policy and test it without a model: ``python 03_policy_offline.py``.

``pytest 03_policy_offline.py`` runs its tests. To try the policy on one of your own runs, pass a
recording as an argument (made with ``attach(..., record=path)`` or ``engine.record_to(path)``).
"""

import sys

import numpy as np

from drlora_core import AllocationRequest, AllocatorConfig, Recording, compare, diagnose, replay
from drlora_core.policies import walk
from drlora_core.testing import check_policy, make_request


def half_by_routing(request: AllocationRequest) -> np.ndarray:
    """Give half of the quota by saliency, the rest by routing; at most two units per expert."""
    limits = np.minimum(request.limits, 2)
    first = walk(request.saliency, make_request(request.quota // 2, request.ranks, limits))
    rest = make_request(request.quota - first.sum(), request.ranks, limits - first)
    return first + walk(request.routing, rest)


def test_policy_satisfies_the_contract() -> None:
    check_policy(half_by_routing)


def test_policy_prefers_salient_then_frequent_experts() -> None:
    request = make_request(
        quota=4, ranks=[1, 1, 1], limits=[4, 4, 4], routing=[0.5, 0.3, 0.2], importance=[0, 0, 1]
    )
    assert half_by_routing(request).tolist() == [2, 0, 2]


def synthetic_recording() -> Recording:
    """Make two layers whose experts differ in routing frequency and in importance."""
    rng = np.random.default_rng(0)
    share = {name: rng.dirichlet(np.ones(16)) for name in ("first", "second")}
    routing = {name: rng.dirichlet(50 * mean, size=100) for name, mean in share.items()}
    level = {name: rng.lognormal(0.0, 1.0, size=16) for name in routing}
    importance = {name: level[name] * rng.lognormal(0.0, 0.2, (100, 16)) for name in routing}
    return Recording.from_arrays(routing, importance)


def main() -> None:
    recording = Recording.open(sys.argv[1]) if len(sys.argv) > 1 else synthetic_recording()
    config = recording.config or AllocatorConfig(
        r_init=4, r_target=8, r_max=16, warmup_steps=20, growth_interval=10, growth_end=100
    )
    paper, own = replay(recording, config), replay(recording, config, policy=half_by_routing)
    for result in (paper, own):
        name, ranks = next(iter(result.final_ranks.items()))
        print(f"{result.policy}: mean rank {ranks.mean():.2f} in layer {name!r}, {ranks.tolist()}")
    for measure, value in compare(paper, own).summary().items():
        print(f"  {measure}: {value:.3f}")
    print(diagnose(recording, config))


if __name__ == "__main__":
    main()
