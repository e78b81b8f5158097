"""A self-contained HTML report of a recorded run, with Plotly figures (extra ``report``)."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from drlora_core.config import AllocatorConfig
from drlora_core.diagnostics import diagnose
from drlora_core.errors import import_extra
from drlora_core.recording import Recording
from drlora_core.replay import CAVEAT, Replay, first_difference, repeats_run, replay

SHOWN_TRAJECTORIES = 3
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.warning { border-left: 4px solid #c60; padding-left: 1em; }
.note { border-left: 4px solid #69c; padding-left: 1em; }
"""


def render(recording: Recording, config: AllocatorConfig | None = None, title: str = "Run") -> str:
    """Render the report as one HTML page: decisions, figures of the ranks, diagnostics.

    A given ``config`` replaces the run's own: the page then shows a replay under it.
    """
    jinja2 = import_extra("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("drlora_core"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    result = replay(recording, config)
    spread = {name: ranks.std() for name, ranks in result.final_ranks.items()}
    most_spread = heapq.nlargest(SHOWN_TRAJECTORIES, spread, key=lambda name: spread[name])
    figures = [total_rank(result), rank_map(result), rank_histogram(result)]
    figures += [trajectories(result, name) for name in most_spread]
    page: str = environment.get_template("report.html").render(
        title=title,
        style=STYLE,
        notes=recording.notes,
        summary=_summarize(recording, result),
        diagnosis=diagnose(recording, config),
        figures=[
            figure.to_html(full_html=False, include_plotlyjs=index == 0)
            for index, figure in enumerate(figures)
        ],
        events=event_rows(result),
        configuration=[{"field": n, "value": v} for n, v in result.config.model_dump().items()],
        caveat=CAVEAT,
    )
    return page


def event_rows(result: Replay) -> list[dict[str, Any]]:
    """Return a dict of plain numbers per event."""
    experts = sum(result.layers.values())
    rows = []
    for event, total in zip(result.events, result.total_rank()[1:], strict=True):
        deltas = np.concatenate(list(event.deltas.values()))
        rows.append(
            {
                "event": event.index,
                "step": event.step,
                "units_placed": int(deltas.sum()),
                "experts_changed": int((deltas != 0).sum()),
                "largest_change": int(deltas[np.abs(deltas).argmax()]),
                "unplaced": event.unplaced,
                "mean_rank": float(total) / experts,
            }
        )
    return rows


def _summarize(recording: Recording, result: Replay) -> str:
    text = (
        f"{recording.steps} steps, {len(recording.layers)} layers, {recording.num_experts} "
        f"experts, {len(result.events)} events; policy {result.policy}."
    )
    if recording.policy not in (result.policy, None):
        return f"{text} The run itself used policy {recording.policy}."
    if not recording.events or not repeats_run(recording, result):
        return text
    if (difference := first_difference(recording.events, result.events)) is None:
        return f"{text} The replay repeats the run's decisions exactly."
    return f"{text} The replay differs from the run: {difference} (recorded, replayed)."


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
    for label, reduce in (("largest", np.max), ("mean", np.mean), ("smallest", np.min)):
        _add_steps(figure, result, label, reduce(ranks, axis=1))
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
