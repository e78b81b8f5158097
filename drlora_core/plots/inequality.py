"""Figures: how unequally rank is spread over the experts.

Shapes: K events, L layers, E experts of all layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core import notebook
from drlora_core.comparison import entropy, gini
from drlora_core.ema import FloatArray, IntArray
from drlora_core.plots.style import (
    BLUE,
    FAINT,
    SKY,
    VERMILLION,
    band,
    base_layout,
    make_figure,
    step_layout,
    step_values,
)
from drlora_core.runs import Drawable, Run, as_run


def lorenz(run: Drawable) -> Any:
    """Draw the Lorenz curve of the ranks at the start, half of the events later and at the end.

    Experts are sorted by rank. A point says which share of all rank the experts with the least rank
    hold; on the diagonal, all hold the same.
    """
    run = as_run(run)
    last = len(run.events)
    labels = {0: "start"} | (
        {last // 2: f"after {notebook.count(last // 2, 'event')}"} if last > 1 else {}
    )
    labels |= {last: "end"} if last else {}
    even = {"color": FAINT, "dash": "dash", "width": 1.5}
    data = [{"x": [0, 1], "y": [0, 1], "name": "all equal", "hoverinfo": "skip", "line": even}]
    for color, (number, label) in zip((SKY, BLUE, VERMILLION), labels.items(), strict=False):
        if not run.ranks[number].any():
            continue  # no rank, no shares
        x, y = lorenz_curve(run.ranks[number])
        data.append(
            {
                "x": x,
                "y": y,
                "name": label,
                "line": {"color": color, "width": 2.5},
                "hovertemplate": f"{label}: %{{x:.0%}} of the experts have %{{y:.1%}} of the rank"
                "<extra></extra>",
            }
        )
    layout = base_layout("Lorenz curve of rank", "share of experts", "share of all rank")
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"range": [0, 1], "tickformat": ".0%"}
    return make_figure([{"type": "scatter", "mode": "lines", **line} for line in data], layout)


def lorenz_curve(ranks: IntArray, points: int = 200) -> tuple[FloatArray, FloatArray]:
    """Return shares of experts and of rank, from (0, 0) to (1, 1), of at most ``points`` experts.

    Example:
        >>> lorenz_curve(np.array([3, 1]))[1].tolist()
        [0.0, 0.25, 1.0]
    """
    total = max(int(ranks.sum()), 1)
    heights = np.concatenate([[0.0], np.cumsum(np.sort(ranks)) / total])
    chosen = np.linspace(0, ranks.size, min(ranks.size, points) + 1).round().astype(int)
    return chosen / ranks.size, heights[chosen]


def spread(run: Drawable) -> Any:
    """Draw the Gini coefficient and the entropy of the ranks over the steps.

    Lines are means over the layers, bands their ranges. Equal ranks have Gini 0 and entropy 1.

    Raises:
        DRLoRAError: SciPy is not installed.
    """
    run = as_run(run)
    data: list[dict[str, Any]] = []
    for name, measure, color in (("entropy", entropy, BLUE), ("Gini", gini, VERMILLION)):
        values = _by_layer(run, measure)
        mean = step_values(run, values.mean(axis=1))
        low, high = (step_values(run, edge(values, axis=1))["y"] for edge in (np.min, np.max))
        if len(run.layers) > 1:
            data += band(mean["x"], low, high, shape="hv", showlegend=False)
        data.append(
            {
                "type": "scatter",
                **mean,
                "name": name,
                "mode": "lines",
                "line": {"shape": "hv", "color": color, "width": 2.5},
                "hovertemplate": f"step %{{x}}: mean {name} %{{y:.3f}}<extra></extra>",
            }
        )
    layout = step_layout("Inequality of rank within layers", "Gini, entropy", run)
    layout["yaxis"]["range"] = [0, 1.02]
    return make_figure(data, layout)


def _by_layer(run: Run, measure: Any) -> FloatArray:
    """Measure the ranks of each layer at the start and after each event, [K + 1, L]."""
    rows = [[measure(row[part]) for part in run.places.values()] for row in run.ranks]
    return np.array(rows, dtype=np.float64)
