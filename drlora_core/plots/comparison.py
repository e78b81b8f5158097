"""Figures that compare the final ranks of two runs, policies or tasks on the same layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.comparison import overlap
from drlora_core.ema import IntArray
from drlora_core.errors import LayoutError
from drlora_core.plots.grid import color_axis, grid_layout, to_grid
from drlora_core.plots.style import (
    BLUE,
    DIFFERENCES,
    ORANGE,
    base_layout,
    harmless,
    layer_labels,
    make_figure,
)
from drlora_core.runs import Drawable, Run, as_run


def rank_difference(one: Drawable, two: Drawable) -> Any:
    """Draw the final rank of every expert in the first run minus that in the second.

    Raises:
        LayoutError: the runs have different layers.
    """
    a, b = _pair(one, two)
    difference = a.ranks[-1] - b.ranks[-1]
    most = max(1, int(np.abs(difference).max()))
    both = np.stack([a.ranks[-1], b.ranks[-1]])
    cells = {
        "type": "heatmap",
        "z": to_grid(a, difference),
        "y": layer_labels(list(a.layers)),
        "customdata": to_grid(a, both),
        "coloraxis": "coloraxis",
        "hovertemplate": "layer %{y}, expert %{x}<br>rank %{customdata[0]} and %{customdata[1]}: "
        "%{z:+d}<extra></extra>",
    }
    layout = grid_layout(a, f"Rank: {harmless(a.name)} minus {harmless(b.name)}")
    layout["coloraxis"] = color_axis(DIFFERENCES, -most, most, "units")
    return make_figure([cells], layout)


def overlap_by_layer(one: Drawable, two: Drawable) -> Any:
    """Draw, for each layer, the share of rank units that both runs give to the same experts.

    The marks show the overlap that chance would give: the mean if the experts of one run were
    shuffled.

    Raises:
        LayoutError: the runs have different layers.
    """
    a, b = _pair(one, two)
    labels = layer_labels(list(a.layers))
    pairs = [(a.ranks[-1][part], b.ranks[-1][part]) for part in a.places.values()]
    bars = {
        "type": "bar",
        "x": labels,
        "y": [overlap(*pair) for pair in pairs],
        "name": "overlap",
        "marker": {"color": BLUE},
        "hovertemplate": "layer %{x}: overlap %{y:.1%}<extra></extra>",
    }
    marks = {
        "type": "scatter",
        "x": labels,
        "y": [chance_overlap(*pair) for pair in pairs],
        "name": "by chance",
        "mode": "markers",
        "marker": {"color": ORANGE, "symbol": "line-ew-open", "size": 12, "line": {"width": 3}},
        "hovertemplate": "layer %{x}: by chance %{y:.1%}<extra></extra>",
    }
    layout = base_layout("Overlap of rank by layer", "layer", "overlap")
    layout["xaxis"]["type"] = "category"
    layout["yaxis"] |= {"range": [0, 1.02], "tickformat": ".0%"}
    return make_figure([bars, marks], layout)


def chance_overlap(one: IntArray, two: IntArray) -> float:
    """Mean overlap of two allocations over all orders of the experts; NaN where both are empty.

    Example:
        >>> chance_overlap(np.array([3, 1]), np.array([3, 1]))
        0.75
    """
    most = max(one.sum(), two.sum())
    shared = np.minimum.outer(one, two).sum() / one.size
    return float(shared / most) if most else float("nan")


def _pair(one: Drawable, two: Drawable) -> tuple[Run, Run]:
    a, b = as_run(one), as_run(two)
    if a.layers != b.layers:
        raise LayoutError(
            f"the runs have different layers: {list(a.layers.items())[:3]} ... and "
            f"{list(b.layers.items())[:3]} ..."
        )
    return a, b
