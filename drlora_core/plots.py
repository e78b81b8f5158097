"""Plotly figures of recordings and replays; they need the extra ``report``.

Shapes: N experts of a layer, K events.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.errors import DRLoRAError
from drlora_core.replay import Replay


def _plotly() -> Any:
    try:
        import plotly.graph_objects as objects
    except ModuleNotFoundError as error:
        raise DRLoRAError('plots need plotly: pip install "drlora[report]"') from error
    return objects


def rank_map(result: Replay) -> Any:
    """Final ranks: a row per layer, a column per expert (sorted by nothing: its index)."""
    objects = _plotly()
    width = max(result.layers.values())
    cells = np.full((len(result.layers), width), np.nan)
    for row, ranks in enumerate(result.final_ranks.values()):
        cells[row, : ranks.size] = ranks
    figure = objects.Figure(
        objects.Heatmap(z=cells, y=list(result.layers), colorbar={"title": "rank"}, zmin=0)
    )
    return _styled(figure, "Final rank of every expert", "expert", "layer")


def total_rank(result: Replay) -> Any:
    """Mean rank over the steps, with the largest and smallest of any expert."""
    objects = _plotly()
    steps = [0, *(event.step for event in result.events)]
    trajectories = np.concatenate([result.trajectory(name) for name in result.layers], axis=1)
    figure = objects.Figure()
    for label, values in (
        ("largest", trajectories.max(axis=1)),
        ("mean", trajectories.mean(axis=1)),
        ("smallest", trajectories.min(axis=1)),
    ):
        figure.add_scatter(x=steps, y=values, name=label, mode="lines", line={"shape": "hv"})
    return _styled(figure, "Rank over the run", "optimizer step", "rank")


def trajectories(result: Replay, name: str) -> Any:
    """Ranks of one layer's experts over the steps."""
    objects = _plotly()
    steps = [0, *(event.step for event in result.events)]
    figure = objects.Figure()
    for expert, ranks in enumerate(result.trajectory(name).T):
        line = {"shape": "hv", "width": 1}
        figure.add_scatter(x=steps, y=ranks, name=f"expert {expert}", mode="lines", line=line)
    return _styled(figure, f"Ranks of {name}", "optimizer step", "rank")


def rank_histogram(result: Replay) -> Any:
    """How many experts ended at each rank."""
    objects = _plotly()
    ranks = np.concatenate(list(result.final_ranks.values()))
    values, counts = np.unique(ranks, return_counts=True)
    return _styled(
        objects.Figure(objects.Bar(x=values, y=counts)), "Experts by final rank", "rank", "experts"
    )


def _styled(figure: Any, title: str, x: str, y: str) -> Any:
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white")
    return figure
