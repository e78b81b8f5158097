"""Heatmaps of layers x experts, layer 0 on top.

Shapes: L layers, W experts of the widest layer, E experts of all layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from drlora_core.ema import FloatArray
from drlora_core.plots.style import base_layout, layer_labels
from drlora_core.runs import Run

ROOM, LEAST_ROW, MOST_ROW, MARGINS = 420, 11, 30, 130  # pixels


def to_grid(run: Run, values: NDArray[Any]) -> NDArray[Any]:
    """Arrange values of all experts, [..., E], as [L, W, ...]; NaN beyond a layer's last expert.

    Whole numbers of layers that are all as wide stay whole numbers, as few bytes as they need.
    """
    sizes, rest = list(run.layers.values()), np.moveaxis(values, -1, 0)
    if len(set(sizes)) == 1:
        grid = rest.reshape(len(sizes), sizes[0], *rest.shape[1:])
        if grid.dtype.kind == "i":
            least, most = (
                np.min_scalar_type(int(edge(initial=0))) for edge in (grid.min, grid.max)
            )
            return grid.astype(np.promote_types(least, most))
        return grid
    made: FloatArray = np.full((len(sizes), max(sizes), *rest.shape[1:]), np.nan)
    for row, part in zip(made, run.places.values(), strict=True):
        row[: part.stop - part.start] = rest[part]
    return made


def grid_layout(run: Run, title: str, extra: int = 0) -> dict[str, Any]:
    """Return a layout with experts across and layers down."""
    count = len(run.layers)
    rows = count * int(np.clip(ROOM / count, LEAST_ROW, MOST_ROW))
    layout = base_layout(title, "expert", "layer", rows + MARGINS + extra)
    layout["xaxis"] |= {"range": [-0.5, max(run.layers.values()) - 0.5], "showgrid": False}
    layout["yaxis"] |= {
        "type": "category",
        "autorange": "reversed",
        "showgrid": False,
        "categoryorder": "array",
        "categoryarray": layer_labels(list(run.layers)),
    }
    return layout


def color_axis(scale: str, low: int, high: int, title: str) -> dict[str, Any]:
    """Return a color axis that all traces of a figure share."""
    bar = {"title": {"text": title}, "thickness": 14, "outlinewidth": 0}
    return {"colorscale": scale, "cmin": low, "cmax": high, "colorbar": bar}
