"""Compare the routing and the replayed ranks of two tasks, from routing traces of one model.

    python -m benchmarks.routing_traces FIRST.npz SECOND.npz

Prints the tables of docs/deepseek_traces.md. A trace has the arrays ``weight_sum`` [steps, layers,
experts] and ``tokens`` [steps].
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np

from drlora_core import AllocatorConfig, Recording, compare, replay
from drlora_core.cli.replay import ten_events
from drlora_core.comparison import gini, spearman, total_variation
from drlora_core.recording import load_trace

POLICIES = ("greedy", "rescored", "proportional", "random")
TOP = 16
Means = Mapping[str, np.ndarray]


def every_second(recording: Recording, start: int) -> Recording:
    """Half of a trace, as a control: how much do two samples of one task differ?"""
    rows = slice(start, None, 2)
    return Recording.from_arrays(
        {name: recording.layer(name).routing[rows] for name in recording.layers},
        {name: recording.layer(name).importance[rows] for name in recording.layers},
    )


def final(recording: Recording, **changes: Any) -> Any:
    """Replay with ten events over the trace and default ranks (8 to 16, at most 32)."""
    return replay(recording, AllocatorConfig(**(ten_events(recording.steps) | changes)))


def means(recording: Recording) -> Means:
    return {name: recording.layer(name).routing.mean(axis=0) for name in recording.layers}


def shared_top(one: np.ndarray, two: np.ndarray) -> float:
    """Share of the most used experts that both have in common."""
    return len(set(np.argsort(-one)[:TOP]) & set(np.argsort(-two)[:TOP])) / TOP


def routing_row(label: str, one: Means, two: Means) -> str:
    values = [
        np.mean([measure(one[name], two[name]) for name in one])
        for measure in (spearman, total_variation, shared_top)
    ]
    return f"| {label} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first")
    parser.add_argument("second")
    arguments = parser.parse_args()
    one, two = load_trace(arguments.first), load_trace(arguments.second)
    pairs = {
        "the two tasks": (one, two),
        "first, odd and even steps": (every_second(one, 0), every_second(one, 1)),
        "second, odd and even steps": (every_second(two, 0), every_second(two, 1)),
    }
    print(f"{one.steps} and {two.steps} steps, {len(one.layers)} layers, {one.num_experts} experts")
    print(f"\n| Mean routing of | Spearman | total variation | shared among the {TOP} most used |")
    print("| --- | --- | --- | --- |")
    for label, (left, right) in pairs.items():
        print(routing_row(label, means(left), means(right)))
    print(
        "\n| Policy | Final ranks of | Spearman | Kendall | total variation | overlap | differing |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for policy in POLICIES:
        for label, (left, right) in pairs.items():
            # Different seeds, or the random policy would agree with itself.
            result = compare(final(left, policy=policy), final(right, policy=policy, seed=1))
            found = result.summary()
            shown = [found[key] for key in ("spearman", "kendall", "total_variation", "overlap")]
            cells = " | ".join(f"{value:.3f}" for value in shown)
            differing = found["differing"] / one.num_experts
            print(f"| {policy} | {label} | {cells} | {differing:.0%} |")
    print("\n| Policy | Gini, first | Gini, second | at r_max, first | unchanged, first |")
    print("| --- | --- | --- | --- | --- |")
    for policy in (*POLICIES, "uniform"):
        left, right = final(one, policy=policy), final(two, policy=policy)
        ginis = [np.mean([gini(r) for r in side.final_ranks.values()]) for side in (left, right)]
        ranks = np.concatenate(list(left.final_ranks.values()))
        full, unchanged = (ranks == 32).mean(), (ranks == left.config.starting_rank).mean()
        print(f"| {policy} | {ginis[0]:.3f} | {ginis[1]:.3f} | {full:.0%} | {unchanged:.0%} |")
    first, second = final(one), final(two)
    by_layer = [spearman(first.final_ranks[n], second.final_ranks[n]) for n in one.layers]
    print("\nSpearman of greedy's final ranks by layer:", " ".join(f"{s:.2f}" for s in by_layer))
    reached = [settled_after(one, share) for share in (0.1, 0.2, 0.4)]
    print(
        "Spearman of mean routing after 10, 20, 40 % of the first trace with all of it:", *reached
    )


def settled_after(recording: Recording, share: float) -> str:
    rows = max(1, int(recording.steps * share))
    values = [
        spearman(layer.routing[:rows].mean(axis=0), layer.routing.mean(axis=0))
        for layer in map(recording.layer, recording.layers)
    ]
    return f"{np.mean(values):.3f}"


if __name__ == "__main__":
    main()
