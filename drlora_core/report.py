"""A self-contained HTML report of a recorded run."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drlora_core import plots
from drlora_core.config import AllocatorConfig
from drlora_core.diagnostics import Diagnosis, diagnose
from drlora_core.recording.data import Recording
from drlora_core.replay import CAVEAT, Replay, first_difference, replay

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
    """Make the report: decisions, rank maps and trajectories, diagnostics.

    Args:
        recording: the run.
        config: replay the run's statistics under another configuration instead of its own.
        title: heading.

    Raises:
        DRLoRAError: plotly is not installed, or the recording cannot be replayed.
    """
    result = replay(recording, config)
    figures = [plots.total_rank(result), plots.rank_map(result), plots.rank_histogram(result)]
    for name in _most_spread(result):
        figures.append(plots.trajectories(result, name))
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p class=note>{html.escape(note)}</p>" for note in recording.notes),
        f"<p>{html.escape(_summary(recording, result))}</p>",
        "<h2>Diagnostics</h2>",
        _findings(diagnose(recording, config)),
        "<h2>Ranks</h2>",
        *(
            figure.to_html(full_html=False, include_plotlyjs=index == 0)
            for index, figure in enumerate(figures)
        ),
        "<h2>Events</h2>",
        _table(event_rows(result)),
        "<h2>Configuration</h2>",
        _table([{"field": n, "value": v} for n, v in result.config.model_dump().items()]),
        f"<p>{html.escape(CAVEAT)}</p>",
    ]
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def event_rows(result: Replay) -> list[dict[str, Any]]:
    """One dict of plain numbers per event."""
    experts = sum(result.layers.values())
    rows = []
    for event, total in zip(result.events, result.total_rank()[1:], strict=True):
        deltas = np.concatenate(list(event.deltas.values()))
        rows.append(
            {
                "event": event.index,
                "step": event.step,
                "units placed": int(deltas.sum()),
                "experts changed": int((deltas != 0).sum()),
                "largest change": int(deltas[np.abs(deltas).argmax()]),
                "unplaced": event.unplaced,
                "mean rank": float(total) / experts,
            }
        )
    return rows


def _most_spread(result: Replay) -> list[str]:
    """Return the layers whose final ranks differ most."""
    spread = {name: float(ranks.std()) for name, ranks in result.final_ranks.items()}
    return sorted(spread, key=lambda name: -spread[name])[:SHOWN_TRAJECTORIES]


def _summary(recording: Recording, result: Replay) -> str:
    text = (
        f"{recording.steps} steps, {len(recording.layers)} layers, {recording.num_experts} "
        f"experts, {len(result.events)} events; policy {result.policy}."
    )
    if result.config == recording.config and recording.events:
        difference = first_difference(recording.events, result.events)
        text += (
            " The replay repeats the run's decisions exactly."
            if difference is None
            else f" The replay differs from the run: {difference} (recorded, replayed)."
        )
    return text


def _findings(diagnosis: Diagnosis) -> str:
    parts = [
        f"<div class={finding.severity}><p><b>{html.escape(finding.message)}</b> "
        f"[{finding.name}]</p><p>Try: {html.escape(finding.advice)}</p></div>"
        for finding in diagnosis.findings
    ]
    reasons = "; ".join(f"{name} ({why})" for name, why in diagnosis.not_checked.items())
    checked = f"<p>Not checked: {html.escape(reasons)}</p>" if reasons else ""
    return ("".join(parts) or "<p>Nothing found.</p>") + checked


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row.values())
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
