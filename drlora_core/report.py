"""A self-contained HTML report of a recorded run, with Plotly figures (extra ``report``)."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from drlora_core import plots
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
    figures = [plots.total_rank(result), plots.rank_map(result), plots.rank_histogram(result)]
    figures += [plots.trajectories(result, name) for name in most_spread]
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
        cut = {"units_cut": sum(int(marked.sum()) for marked in event.cut.values())}
        rows.append(
            {
                "event": event.index,
                "step": event.step,
                "units_placed": int(deltas.sum()),
                **(cut if result.config.cuts else {}),
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
