"""Figure: final rank of every expert against how much the router used it.

Shapes: E experts of all layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.comparison import mean_of_defined, spearman
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError
from drlora_core.plots.style import (
    COUNTS,
    GRAY,
    RANKS,
    base_layout,
    harmless,
    make_figure,
    to_short,
)
from drlora_core.runs import Drawable, Run, as_run

MOST_POINTS = 3000
BINS = 60


def rank_against_routing(run: Drawable) -> Any:
    """Draw the final rank of every expert against the mean of its routing weight over the run.

    The title gives Spearman's correlation within layers, on average. The color of a point is its
    layer; more than 3,000 experts are counted in cells instead.

    Raises:
        LayoutError: no routing was recorded.
        DRLoRAError: SciPy is not installed.
    """
    run = as_run(run)
    weights, ranks = mean_routing(run), run.final
    known = ~np.isnan(weights)
    if not known.any():
        raise LayoutError("no routing was recorded, so there is nothing to draw rank against")
    value = routing_correlation(run)
    words = f": Spearman correlation {value:.2f}" if not np.isnan(value) else ""
    title = f"Rank against routing{words}"
    layout = base_layout(title, "mean routing weight of a token", "final rank")
    layout["yaxis"]["rangemode"] = "tozero"
    if known.sum() > MOST_POINTS:
        return make_figure([_draw_cells(weights[known], ranks[known])], layout)
    return make_figure([_draw_points(run, weights, ranks)], layout)


def mean_routing(run: Run) -> FloatArray:
    """Mean of phi over the steps that have it, [E]; NaN where no step does."""
    routing = run.recording.routing
    given = ~np.isnan(routing)
    total = np.where(given, routing, 0.0).sum(axis=0)
    count = given.sum(axis=0)
    mean: FloatArray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def routing_correlation(run: Run) -> float:
    """Spearman's correlation of final rank and mean routing weight: mean over layers, or NaN."""
    weights, ranks = mean_routing(run), run.final
    values = [
        spearman(weights[part], ranks[part])
        for part in run.places.values()
        if not np.isnan(weights[part]).any()
    ]
    return mean_of_defined(values)


def _draw_points(run: Run, weights: FloatArray, ranks: IntArray) -> dict[str, Any]:
    names = np.array([harmless(name) for name in run.layers], dtype=object)
    sizes = list(run.layers.values())
    layers = np.repeat(np.arange(len(sizes)), sizes)
    experts = np.concatenate([np.arange(size) for size in sizes])
    texts = [
        np.char.mod("%.3g", signal[-1] if len(signal) else np.zeros(ranks.size))
        for signal in run.history.signals
    ]
    return {
        "type": "scatter",
        "x": to_short(weights),
        "y": ranks,
        "mode": "markers",
        "cliponaxis": False,
        "marker": {
            "color": layers,
            "colorscale": RANKS,
            "size": 8,
            "opacity": 0.8,
            "line": {"width": 1, "color": GRAY},
        },
        "customdata": np.stack([names[layers], experts.astype(object), *texts], axis=1),
        "hovertemplate": "%{customdata[0]}<br>expert %{customdata[1]}<br>rank %{y}, mean weight "
        "%{x:.3g}<br>f %{customdata[2]}, g %{customdata[3]}, S %{customdata[4]} at the end"
        "<extra></extra>",
    }


def _draw_cells(weights: FloatArray, ranks: IntArray) -> dict[str, Any]:
    rows = int(ranks.max()) + 1
    edges = np.linspace(0.0, max(float(np.quantile(weights, 0.999)), 1e-12), BINS + 1)
    counts, _, _ = np.histogram2d(
        np.minimum(weights, edges[-1]), ranks, bins=(edges, np.arange(rows + 1) - 0.5)
    )
    cells = np.where(counts > 0, counts, np.nan).T
    return {
        "type": "heatmap",
        "z": np.log10(cells).astype(np.float32),
        "x": (edges[1:] + edges[:-1]) / 2,
        "y": np.arange(rows),
        "customdata": cells.astype(np.float32),
        "colorscale": COUNTS,
        "zmin": 0,
        "colorbar": {"title": {"text": "experts"}, "thickness": 14, **_powers(cells)},
        "hovertemplate": "mean weight %{x:.3g}, rank %{y}: %{customdata:,} experts<extra></extra>",
    }


def _powers(cells: FloatArray) -> dict[str, Any]:
    powers = range(int(np.log10(np.nanmax(cells))) + 1)
    return {"tickvals": list(powers), "ticktext": [f"{10**power:,}" for power in powers]}
