"""Figure: the ranks of one layer's experts over the steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.ema import IntArray
from drlora_core.plots.experts import highlighted, others
from drlora_core.plots.style import (
    COLORS,
    GRAY,
    band,
    harmless,
    make_figure,
    step_layout,
    step_values,
    to_short,
)
from drlora_core.runs import Drawable, Run, as_run


def trajectories(run: Drawable, layer: str) -> Any:
    """Draw the ranks of a layer's experts over the steps.

    The experts that ended with the most rank are lines; the others are a band from the smallest to
    the largest rank, and their mean.

    Raises:
        UnknownLayerError: naming close names.
    """
    run = as_run(run)
    lines, rest = highlighted(run, layer), others(run, layer)
    ranks = run.ranks[:, run.places[layer]]
    what = f"the other {len(rest)}" if lines else f"all {len(rest)}"
    data = _draw_range(run, ranks[:, rest], what) if rest else []
    for color, expert in zip(COLORS, lines, strict=False):
        line = step_values(run, ranks[:, expert])
        data.append(
            {
                "type": "scatter",
                **line,
                "name": f"expert {expert}",
                "mode": "lines",
                "line": {"shape": "hv", "color": color, "width": 2.5},
                **_hover(run, layer, expert, line["x"]),
            }
        )
    return make_figure(data, step_layout(f"Ranks of layer {harmless(layer)}", "rank", run))


def _hover(run: Run, layer: str, expert: int, steps: list[int]) -> dict[str, Any]:
    """Text for points at steps; f, g and S are those that an event was decided by."""
    text = f"layer {harmless(layer)}, expert {expert}<br>step %{{x}}: rank %{{y}}"
    if not len(run.history.steps):
        return {"hovertemplate": text + "<extra></extra>"}
    rows = [run.history.row_at(step) for step in steps]
    place = run.places[layer].start + expert
    values = np.stack([signal[rows, place] for signal in run.history.signals], axis=1)
    signals = "f %{customdata[0]:.3g}, g %{customdata[1]:.3g}, S %{customdata[2]:.3g}"
    return {"customdata": to_short(values), "hovertemplate": f"{text}<br>{signals}<extra></extra>"}


def _draw_range(run: Run, ranks: IntArray, what: str) -> list[dict[str, Any]]:
    """Draw the range and the mean of ranks [K + 1, N]."""
    mean = step_values(run, ranks.mean(axis=1))
    low, high = (step_values(run, edge(ranks, axis=1))["y"] for edge in (np.min, np.max))
    line = {
        "type": "scatter",
        **mean,
        "name": f"{what}: mean",
        "mode": "lines",
        "line": {"shape": "hv", "color": GRAY, "width": 2, "dash": "dash"},
        "hovertemplate": f"{what}<br>step %{{x}}: mean rank %{{y:.2f}}<extra></extra>",
    }
    return [*band(mean["x"], low, high, shape="hv", name=f"{what}: range"), line]
