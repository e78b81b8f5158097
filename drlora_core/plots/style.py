"""What all figures share: colors, empty figures, the step axis, and names made harmless.

Colors are those of Okabe and Ito, and the scales viridis, cividis and PuOr: people who do not see
all colors can tell them apart. Lines in gray are half transparent, so that they show on white and
on black.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core import notebook
from drlora_core.errors import import_extra
from drlora_core.runs import Run
from drlora_core.runs.history import evenly

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
RANKS, COUNTS, DIFFERENCES = "Viridis", "Cividis", "PuOr"
GRAY, FAINT, BAND = "rgba(128,128,128,0.9)", "rgba(128,128,128,0.45)", "rgba(128,128,128,0.25)"
MARKED_EVENTS, MOST_DRAWN = 64, 128
LABEL_CHARACTERS = 40
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def base_layout(title: str, x: str, y: str, height: int = 380) -> dict[str, Any]:
    """Return a layout with axis titles; the texts are taken as they are."""
    return {
        "title": {"text": title},
        "template": "plotly_white",
        "height": height,
        "font": {"family": FONT, "size": 13},
        "colorway": list(COLORS),
        "margin": {"l": 64, "r": 16, "t": 48, "b": 48},
        "hoverlabel": {"align": "left"},
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top"},
        "xaxis": {"title": {"text": x, "standoff": 8}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
    }


def step_layout(title: str, y: str, run: Run, height: int = 380) -> dict[str, Any]:
    """Return a layout whose horizontal axis is the whole run, and whose vertical one has 0."""
    layout = base_layout(title, "optimizer step", y, height)
    layout["xaxis"]["range"] = [0, run.last_step]
    layout["yaxis"]["rangemode"] = "tozero"
    return layout


def make_figure(data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> Any:
    """Make a Plotly figure of traces and a layout, all at once: Plotly checks each change anew.

    Raises:
        DRLoRAError: Plotly is not installed.
    """
    graph_objects = import_extra("plotly.graph_objects", "report")
    return graph_objects.Figure(data=list(data), layout=layout)


def event_marks(run: Run, axis: str = "y") -> list[dict[str, Any]]:
    """Return vertical lines at the growth events; of many events, the span that they take."""
    steps = run.event_steps
    mark = {"y0": 0, "y1": 1, "yref": f"{axis} domain", "xref": "x", "layer": "below"}
    if len(steps) > MARKED_EVENTS:
        span = {"type": "rect", "fillcolor": BAND, "line": {"width": 0}}
        return [mark | span | {"x0": steps[0], "x1": steps[-1]}]
    line = mark | {"type": "line", "line": {"color": FAINT, "width": 1, "dash": "dot"}}
    return [line | {"x0": step, "x1": step} for step in steps]


def step_values(run: Run, values: ArrayLike) -> dict[str, Any]:
    """Coordinates of a line that changes at each event and goes on to the end of the run.

    Of many events, some are drawn.

    Args:
        run: its events are the steps.
        values: at the start and after each event, [K + 1].
    """
    steps, heights = [0, *run.event_steps], np.asarray(values)
    end = max(run.recording.steps, steps[-1], run.losses.last_step)
    drawn = evenly(len(steps), MOST_DRAWN)
    return {"x": [*(steps[number] for number in drawn), end], "y": heights[[*drawn, -1]]}


def band(x: Any, low: Any, high: Any, *, shape: str = "linear", **options: Any) -> list[Any]:
    """Return two traces with a gray band between them; ``options`` are of the named one."""
    edge = {"type": "scatter", "mode": "lines", "x": x, "hoverinfo": "skip"}
    edge |= {"line": {"width": 0, "shape": shape, "color": GRAY}}
    axis = {name: options[name] for name in ("yaxis", "legendgroup") if name in options}
    return [
        edge | axis | {"y": high, "showlegend": False},
        edge | {"y": low, "fill": "tonexty", "fillcolor": BAND} | options,
    ]


def to_short(values: ArrayLike) -> NDArray[np.float32]:
    """Round to three digits and more, as 32 bits of which 12 are 0: figures become smaller.

    Example:
        >>> [f"{value:.4f}" for value in to_short([0.5, 1 / 3])]
        ['0.5000', '0.3334']
    """
    with np.errstate(over="ignore"):  # beyond 32 bits: infinite, which figures leave out
        bits = np.asarray(values).astype(np.float32).view(np.uint32)
    finite = np.isfinite(bits.view(np.float32))
    rounded = np.where(finite, (bits + np.uint32(0x800)) & np.uint32(0xFFFFF000), bits)
    return rounded.view(np.float32)


def harmless(name: str, characters: int = LABEL_CHARACTERS) -> str:
    """Escape a name for Plotly, which reads HTML tags in texts, and cut a long one.

    Example:
        >>> harmless("<b>experts</b>")
        '&lt;b&gt;experts&lt;/b&gt;'
    """
    text = notebook.shorten(name, characters).encode("utf-8", "replace").decode()
    printable = "".join(letter if letter.isprintable() else "�" for letter in text)
    return html.escape(printable, quote=False).replace("%{", "%&#123;")  # as in hover texts


def layer_labels(layers: Sequence[str]) -> list[str]:
    """Shorten layer names to what tells them apart, for an axis.

    Example:
        >>> layer_labels(["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"])
        ['0', '1']
    """
    parts = [name.split(".") for name in layers]
    for end in (0, -1):
        while all(len(part) > 1 for part in parts) and len({part[end] for part in parts}) == 1:
            for part in parts:
                del part[end]
    labels = [harmless(".".join(part), 24) for part in parts]
    if len(set(labels)) < len(labels):  # cut alike
        return [f"{number} {label}" for number, label in enumerate(labels)]
    return labels
