"""Figures of a run's ranks, as Plotly figures (extra ``report``); the HTML report shows them.

Each function takes a :class:`~drlora_core.Recording`, of which it draws the recorded run, or a
replay: ``drlora_core.replay(recording, config)`` draws what another configuration would decide.
They raise LayoutError for a recording without a configuration, or of a policy of the user's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.errors import LayoutError, import_extra
from drlora_core.recording import Recording
from drlora_core.replay import Replay, replay


def rank_map(run: Replay | Recording) -> Any:
    """Draw the final ranks: a row per layer, a column per expert in index order."""
    result = _decisions(run)
    width = max(result.layers.values())
    cells = np.full((len(result.layers), width), np.nan)
    for row, ranks in enumerate(result.final_ranks.values()):
        cells[row, : ranks.size] = ranks
    figure = _figure("Final rank of every expert", "expert", "layer")
    return figure.add_heatmap(z=cells, y=list(result.layers), colorbar={"title": "rank"}, zmin=0)


def total_rank(run: Replay | Recording) -> Any:
    """Draw the largest, mean and smallest rank of all experts over the steps."""
    result = _decisions(run)
    ranks = np.concatenate([result.trajectory(name) for name in result.layers], axis=1)
    figure = _figure("Rank over the run", "optimizer step", "rank")
    for label, reduce in (("largest", np.max), ("mean", np.mean), ("smallest", np.min)):
        _add_steps(figure, result, label, reduce(ranks, axis=1))
    return figure


def trajectories(run: Replay | Recording, name: str) -> Any:
    """Draw the ranks of one layer's experts over the steps."""
    result = _decisions(run)
    figure = _figure(f"Ranks of {name}", "optimizer step", "rank")
    for expert, ranks in enumerate(result.trajectory(name).T):
        _add_steps(figure, result, f"expert {expert}", ranks, width=1)
    return figure


def rank_histogram(run: Replay | Recording) -> Any:
    """Draw how many experts ended at each rank."""
    result = _decisions(run)
    ranks = np.concatenate(list(result.final_ranks.values()))
    values, counts = np.unique(ranks, return_counts=True)
    return _figure("Experts by final rank", "rank", "experts").add_bar(x=values, y=counts)


def _decisions(run: Replay | Recording) -> Replay:
    if isinstance(run, Replay):
        return run
    result = replay(run)
    if run.policy not in (result.policy, None):
        raise LayoutError(
            f"the run was decided by policy {run.policy!r}, whose code is not recorded; draw "
            f"drlora_core.replay(recording, policy=...)"
        )
    return result


def _figure(title: str, x: str, y: str) -> Any:
    figure = import_extra("plotly.graph_objects", "report").Figure()
    return figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white")


def _add_steps(figure: Any, result: Replay, label: str, values: Any, width: float = 2) -> None:
    """Add a line that changes at each event; ``values`` are at the start and after each event."""
    steps = [0, *(event.step for event in result.events)]
    line = {"shape": "hv", "width": width}
    figure.add_scatter(x=steps, y=values, name=label, mode="lines", line=line)
