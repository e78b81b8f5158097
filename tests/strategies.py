"""Hypothesis strategies: feasible configurations, layers, and samples with ties and zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

GROWTH_POLICIES = ("greedy", "rescored", "proportional", "random")
POLICIES = (*GROWTH_POLICIES, "uniform", "prune", "move")
STYLES = ("generic", "ties", "zeros", "constant")
Samples = list[dict[str, tuple[list[float] | None, list[Any] | None]]]


@st.composite
def options(
    draw: st.DrawFn,
    /,
    policies: tuple[str, ...] = POLICIES,
    scopes: tuple[str, ...] = ("layer",),
    **fixed: Any,
) -> dict[str, Any]:
    """Arguments of a feasible AllocatorConfig, small enough to run to the end."""
    policy = draw(st.sampled_from(policies))
    small, extra = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    small -= policy not in ("uniform", "prune") and draw(st.booleans())  # may start at rank 0
    extra += not small
    large = small + extra
    events, interval = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    warmup = draw(st.integers(0, 3))
    least = max(1, -(-extra // events))
    values: dict[str, Any] = {
        "r_init": large if policy == "prune" else small,
        "r_target": small if policy == "prune" else large,
        "r_max": large + draw(st.integers(0, 4)),
        "warmup_steps": warmup,
        "growth_interval": interval,
        "growth_end": warmup + events * interval + draw(st.integers(0, interval - 1)),
        "quota": draw(st.none() | st.integers(1, 12)),
        "max_growth": draw(st.none() | st.integers(least, least + 2)),
        "gamma": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        "routing_decay": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "importance_decay": draw(st.sampled_from([0.0, 0.75, 0.9])),
        "use_routing": draw(st.sampled_from([True, True, False])),
        "use_importance": draw(st.sampled_from([True, True, False])),
        "policy": policy,
        "scope": draw(st.sampled_from(scopes)),
        "seed": draw(st.integers(0, 3)),
        "move_share": draw(st.sampled_from([0.2, 0.5, 1.0])),
        "r_min": draw(st.integers(0, small)),
    }
    if policy == "move":
        values["scope"] = "layer"
    if values["scope"] == "global":
        values["layer_floor"] = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
        if policy in GROWTH_POLICIES:
            values["layer_ceiling"] = draw(st.none() | st.integers(large, values["r_max"]))
    return values | fixed


@st.composite
def layers(draw: st.DrawFn, most: int = 3) -> dict[str, int]:
    """Layer names and their numbers of experts."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=most))
    return {f"layers.{index}": size for index, size in enumerate(sizes)}


seeds = st.integers(0, 2**32 - 1)
styles = st.sampled_from(STYLES)


def _numbers(generator: np.random.Generator, style: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if style == "constant":
        return np.full(shape, 0.25)
    if style == "ties":
        return generator.choice([0.0, 0.25, 1.0], shape)
    if style == "zeros":
        return generator.random(shape) * generator.integers(0, 2, shape)
    return generator.random(shape)


def make_samples(
    options: dict[str, Any],
    layers: dict[str, int],
    seed: int,
    style: str,
    steps: int,
    *,
    skip_first: bool = False,
) -> Samples:
    """Samples of every step and layer; the arrays are lists, None where a step is skipped.

    The first step is skipped only with ``skip_first``: an event before the first sample waits.

    In every style some experts are never routed to, and their gradients are zero (design: an
    unvisited expert has zeros, not a missing entry).
    """
    generator = np.random.default_rng(seed)
    visited = {name: generator.random(size) < 0.85 for name, size in layers.items()}
    samples: Samples = []
    for _ in range(steps):
        step: dict[str, tuple[list[float] | None, list[Any] | None]] = {}
        for name, size in layers.items():
            wide = options["policy"] in ("prune", "move") or generator.random() < 0.5
            shape = (size, options["r_max"]) if wide else (size,)
            routing = _numbers(generator, style, (size,)) * visited[name]
            importance = _numbers(generator, style, shape)
            importance *= visited[name][:, None] if wide else visited[name]
            skipped = generator.random() < 0.1 and (skip_first or bool(samples))
            step[name] = (None, None) if skipped else (routing.tolist(), importance.tolist())
        samples.append(step)
    return samples
