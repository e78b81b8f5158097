"""The engine decides what the slow reference decides, on hundreds of random runs."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import assume, given

from tests.core.comparison import assert_same_decisions
from tests.marks import slow_but
from tests.strategies import STYLES, layers, make_samples, options, seeds, styles

COMPARED = ("greedy", "rescored", "proportional", "uniform", "prune", "move")


@given(options(policies=COMPARED), layers(), seeds, styles)
def test_decisions_equal_those_of_the_reference(
    options: dict[str, Any], layers: dict[str, int], seed: int, style: str
) -> None:
    samples = make_samples(
        options, layers, seed, style, steps=options["growth_end"] + 2, skip_first=True
    )
    _, left_early = assert_same_decisions(options, layers, samples)
    assume(not left_early)


def random_run(seed: int, policy: str, style: str) -> tuple[dict[str, Any], dict[str, int], Any]:
    """A configuration of a more realistic size than hypothesis draws, with its samples."""
    draw = random.Random(f"{seed} {policy} {style}")
    least = 1 if policy == "prune" else 0
    low, events, interval = draw.randint(least, 4), draw.randint(1, 6), draw.randint(1, 4)
    high = low + draw.randint(1, 6)
    warmup = draw.randint(0, 5)
    options: dict[str, Any] = {
        "r_init": high if policy == "prune" else low,
        "r_target": low if policy == "prune" else high,
        "r_max": high + draw.randint(0, 6),
        "warmup_steps": warmup,
        "growth_interval": interval,
        "growth_end": warmup + interval * events + draw.randrange(interval),
        "quota": draw.choice([None, None, draw.randint(1, 40)]),
        "max_growth": draw.choice([None, -(-(high - low) // events) + draw.randint(0, 1)]),
        "gamma": draw.choice([0.0, 0.5, 1.0, 1.7]),
        "routing_decay": draw.choice([0.0, 0.5, 0.9, 0.99]),
        "importance_decay": draw.choice([0.0, 0.5, 0.9, 0.99]),
        "use_routing": draw.random() < 0.8,
        "use_importance": draw.random() < 0.8,
        "policy": policy,
        "move_share": draw.choice([0.1, 0.3, 1.0]),
        "r_min": draw.randint(0, low),
    }
    layers = {f"model.layers.{i}": draw.randint(1, 16) for i in range(draw.randint(1, 3))}
    steps = options["growth_end"] + 2
    return options, layers, make_samples(options, layers, seed, style, steps, skip_first=True)


@pytest.mark.parametrize("policy", slow_but(COMPARED, ["move"]))
def test_a_hundred_seeded_runs_of_each_policy(policy: str) -> None:
    compared, left_early = 0, 0
    for seed in range(14 if policy == "move" else 25):
        for style in STYLES:
            events, early = assert_same_decisions(*random_run(seed, policy, style))
            compared += events
            left_early += early
    # The comparison means something: hardly any run hangs on the last bit of a score.
    assert compared >= 150
    assert left_early <= 15
