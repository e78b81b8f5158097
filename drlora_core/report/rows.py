"""Tables of the report, as dicts of plain values."""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.config import AllocatorConfig
from drlora_core.runs import Drawable, Run, as_run

TOP_EXPERTS = 10
Row = dict[str, Any]


def event_rows(run: Drawable) -> list[Row]:
    """Return a dict of plain numbers per event."""
    run = as_run(run)
    experts, rows = run.recording.num_experts, []
    for event, ranks in zip(run.events, run.ranks[1:], strict=True):
        deltas = np.concatenate(list(event.deltas.values()))
        units_cut = sum(int(marked.sum()) for marked in event.cut.values())
        rows.append(
            {
                "event": event.index,
                "step": event.step,
                "units_placed": int(deltas.sum()) + units_cut,
                **({"units_cut": units_cut} if run.config.cuts else {}),
                "experts_changed": int((deltas != 0).sum()),
                "largest_change": int(deltas[np.abs(deltas).argmax()]),
                "unplaced": event.unplaced,
                "mean_rank": float(ranks.sum()) / experts,
            }
        )
    return rows


def top_experts(run: Run) -> list[Row]:
    """Return the experts with the most rank; of the same rank, those that got there first."""
    start, final = run.ranks[0], run.final
    order = np.lexsort((-run.ranks.sum(axis=0), -final))[:TOP_EXPERTS]
    history, names = run.history, list(run.layers)
    ends = np.cumsum(list(run.layers.values()))
    rows = []
    for place in order.tolist():
        layer = int(np.searchsorted(ends, place, side="right"))
        row: Row = {
            "layer": names[layer],
            "expert": place - int(ends[layer]) + run.layers[names[layer]],
            "rank at the start": int(start[place]),
            "rank at the end": int(final[place]),
        }
        if len(history.steps):
            for symbol, values in zip("fgS", history.signals, strict=True):
                row[symbol] = float(values[run.history_row(run.kept), place])
        rows.append(row)
    return rows


def configuration_rows(config: AllocatorConfig) -> list[Row]:
    """Return a dict per field: its name, its value, and whether that is the default."""
    fields = type(config).model_fields
    return [
        {"field": name, "value": value, "is_default": value == fields[name].default}
        for name, value in config.model_dump().items()
    ]
