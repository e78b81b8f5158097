"""Plotly figures of replays (extra ``report``).

Shapes: N experts of a layer, K events.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.errors import import_extra
from drlora_core.replay import Replay


def rank_map(result: Replay) -> Any:
    """Draw the final ranks: a row per layer, a column per expert in index order."""
    width = max(result.layers.values())
    cells = np.full((len(result.layers), width), np.nan)
    for row, ranks in enumerate(result.final_ranks.values()):
        cells[row, : ranks.size] = ranks
    figure = _figure("Final rank of every expert", "expert", "layer")
    return figure.add_heatmap(z=cells, y=list(result.layers), colorbar={"title": "rank"}, zmin=0)


def total_rank(result: Replay) -> Any:
    """Draw the largest, mean and smallest rank of all experts over the steps."""
    ranks = np.concatenate([result.trajectory(name) for name in result.layers], axis=1)
    figure = _figure("Rank over the run", "optimizer step", "rank")
    for label, values in (
        ("largest", ranks.max(axis=1)),
        ("mean", ranks.mean(axis=1)),
        ("smallest", ranks.min(axis=1)),
    ):
        _add_steps(figure, result, label, values)
    return figure


def trajectories(result: Replay, name: str) -> Any:
    """Draw the ranks of one layer's experts over the steps."""
    figure = _figure(f"Ranks of {name}", "optimizer step", "rank")
    for expert, ranks in enumerate(result.trajectory(name).T):
        _add_steps(figure, result, f"expert {expert}", ranks, width=1)
    return figure


def rank_histogram(result: Replay) -> Any:
    """Draw how many experts ended at each rank."""
    ranks = np.concatenate(list(result.final_ranks.values()))
    values, counts = np.unique(ranks, return_counts=True)
    return _figure("Experts by final rank", "rank", "experts").add_bar(x=values, y=counts)


def _figure(title: str, x: str, y: str) -> Any:
    figure = import_extra("plotly.graph_objects", "report").Figure()
    return figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white")


def _add_steps(figure: Any, result: Replay, label: str, values: Any, width: float = 2) -> None:
    """Add a line that changes at each event; ``values`` are at the start and after each event."""
    steps = [0, *(event.step for event in result.events)]
    line = {"shape": "hv", "width": width}
    figure.add_scatter(x=steps, y=values, name=label, mode="lines", line=line)
