"""Figures that compare the final ranks of two runs, policies or tasks on the same layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.comparison import chance_overlap, overlap
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
from drlora_core.runs import Drawable, Run, as_run, tell_apart


def rank_difference(one: Drawable, two: Drawable) -> Any:
    """Draw the final rank of every expert in the first run minus that in the second.

    Raises:
        LayoutError: the runs have different layers.
    """
    a, b = _pair(one, two)
    difference = a.final - b.final
    most = max(1, int(np.abs(difference).max()))
    both = np.stack([a.final, b.final])
    cells = {
        "type": "heatmap",
        "z": to_grid(a, difference),
        "y": layer_labels(list(a.layers)),
        "customdata": to_grid(a, both),
        "coloraxis": "coloraxis",
        "hoverongaps": False,
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
    pairs = [(a.final[part], b.final[part]) for part in a.places.values()]
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


def _pair(one: Drawable, two: Drawable) -> tuple[Run, Run]:
    a, b = as_run(one), as_run(two)
    if a.layers != b.layers:
        raise LayoutError(
            f"the runs have different layers: {list(a.layers.items())[:3]} ... and "
            f"{list(b.layers.items())[:3]} ..."
        )
    return a, tell_apart(a, b)
