"""Figure: f, g and S of one layer's experts over the steps."""

from __future__ import annotations

from typing import Any

from drlora_core.plots.experts import highlighted, others
from drlora_core.plots.style import (
    COLORS,
    band,
    base_layout,
    event_marks,
    harmless,
    make_figure,
    to_short,
)
from drlora_core.runs import Drawable, Run, as_run

PANELS = {"routing": "f, routing", "importance": "g, importance", "saliency": "S, saliency"}
AXES = ("y", "y2", "y3")
HEIGHT, GAP = 690, 0.06  # pixels, and share of it between two panels


def signals(run: Drawable, layer: str) -> Any:
    """Draw routing frequency f, rank importance g and saliency S of a layer over the steps.

    The experts are those of :func:`trajectories`; the band is the range of the others. Dotted lines
    are growth events: values are those by which the event was decided.

    Raises:
        UnknownLayerError: naming close names.
    """
    run = as_run(run)
    lines = highlighted(run, layer)
    data: list[dict[str, Any]] = []
    for axis, field in zip(AXES, PANELS, strict=True):
        data += _draw_panel(run, layer, axis, field)
    layout = base_layout(f"f, g and S of layer {harmless(layer)}", "optimizer step", "", HEIGHT)
    layout["xaxis"] |= {"range": [0, run.last_step], "anchor": AXES[-1]}
    layout["legend"] |= {"y": -0.09}
    layout["showlegend"] = bool(lines)
    layout["shapes"] = [mark for axis in AXES for mark in event_marks(run, axis)]
    height = (1 - GAP * (len(AXES) - 1)) / len(AXES)
    for place, (axis, label) in enumerate(zip(AXES, PANELS.values(), strict=True)):
        top = 1 - place * (height + GAP)
        layout[f"yaxis{axis[1:]}"] = {
            "title": {"text": label},
            "domain": [max(0.0, top - height), top],
            "rangemode": "tozero",
            "automargin": True,
        }
    return make_figure(data, layout)


def _draw_panel(run: Run, layer: str, axis: str, field: str) -> list[dict[str, Any]]:
    history, data = run.history, []
    values = getattr(history, field)[:, run.places[layer]]
    rest = others(run, layer)
    low, high = values[:, rest].min(axis=1), values[:, rest].max(axis=1)
    options: dict[str, Any] = {
        "name": "range of the others",
        "legendgroup": "others",
        "yaxis": axis,
    }
    options["showlegend"] = axis == "y"
    data += band(history.steps, to_short(low), to_short(high), **options)
    for color, expert in zip(COLORS, highlighted(run, layer), strict=False):
        data.append(
            {
                "type": "scatter",
                "x": history.steps,
                "y": to_short(values[:, expert]),
                "yaxis": axis,
                "name": f"expert {expert}",
                "mode": "lines",
                "line": {"color": color, "width": 1.8},
                "legendgroup": f"expert {expert}",
                "showlegend": axis == "y",
                "hovertemplate": f"layer {harmless(layer)}, expert {expert}<br>"
                f"step %{{x}}: {PANELS[field][0]} %{{y:.4g}}"
                "<extra></extra>",
            }
        )
    return data
