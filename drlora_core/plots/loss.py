"""Figure: training and held-out loss, with the growth events.

Shapes: T logged steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError
from drlora_core.plots.style import (
    COLORS,
    ORANGE,
    event_marks,
    harmless,
    make_figure,
    step_layout,
    to_short,
)
from drlora_core.runs import Drawable, Losses, Run, as_run

MOST_POINTS = 1000
SMOOTHED = 40  # the running mean is over a 40th of the steps


def loss(run: Drawable, against: Drawable | None = None) -> Any:
    """Draw the loss of a run over its steps, and mark the growth events.

    The thin line is the loss of each batch, the thick one its running mean, the points are the
    held-out loss. Methods trained beside the run (``--compare``) and another run are drawn too.

    Args:
        run: opened with :func:`drlora_core.runs.open_run`; recordings have no losses.
        against: another run.

    Raises:
        LayoutError: no loss was logged.
    """
    run = as_run(run)
    if not run.losses.last_step and not len(run.losses.held_out):
        raise LayoutError(
            "the run has no losses: open a folder with a metrics.jsonl (drlora_core.runs.open_run)"
        )
    curves = [(run.policy, run.losses), *((name, losses) for name, losses, _ in run.compared)]
    if against is not None:
        other = as_run(against)
        taken = other.name in [name for name, _ in curves]
        name = f"{other.name} (other run)" if taken else other.name
        unit = "" if other.loss_unit == run.loss_unit else f" in {other.loss_unit}"
        curves.append((name + unit, other.losses))
    data: list[dict[str, Any]] = []
    for number, (name, losses) in enumerate(curves):
        data += _draw_curves(losses, harmless(name, 48), COLORS[number % len(COLORS)])
    layout = step_layout("Training and held-out loss", run.loss_unit, run)
    layout["xaxis"]["range"][1] = max(run.last_step, *(losses.last_step for _, losses in curves))
    layout["shapes"] = event_marks(run)
    return make_figure([*data, *_draw_events(run)], layout)


def _draw_curves(losses: Losses, name: str, color: str) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = []
    if len(losses.training):
        steps, values = thin(losses.steps, losses.training)
        thick = thin(losses.steps, running_mean(losses.training))[1]
        line = {"type": "scatter", "mode": "lines", "x": steps}
        raw = {"y": to_short(values), "line": {"color": color, "width": 1}, "opacity": 0.35}
        smooth = {
            "y": to_short(thick),
            "name": f"{name}, training",
            "line": {"color": color, "width": 2.5},
            "hovertemplate": f"{name}<br>step %{{x}}: training loss %{{y:.4f}}<extra></extra>",
        }
        data += [line | raw | {"showlegend": False, "hoverinfo": "skip"}, line | smooth]
    if len(losses.held_out):
        data.append(
            {
                "type": "scatter",
                "x": losses.held_out_steps,
                "y": losses.held_out,
                "name": f"{name}, held out",
                "mode": "lines+markers",
                "cliponaxis": False,
                "line": {"color": color, "width": 1.5, "dash": "dash"},
                "marker": {"size": 8, "symbol": "diamond"},
                "hovertemplate": f"{name}<br>step %{{x}}: held-out loss %{{y:.4f}}<extra></extra>",
            }
        )
    return data


def _draw_events(run: Run) -> list[dict[str, Any]]:
    """Put a point on the training loss at every event, to hover over."""
    if not run.events or not len(run.losses.training):
        return []
    smooth = running_mean(run.losses.training)
    texts = [
        f"{run.event_noun} {event.index} after step {event.step}<br>total rank {int(total):,}"
        for event, total in zip(run.events, run.ranks[1:].sum(axis=1), strict=True)
    ]
    points = {
        "type": "scatter",
        "x": run.event_steps,
        "y": np.interp(run.event_steps, run.losses.steps, smooth),
        "name": run.event_noun,
        "mode": "markers",
        "marker": {"color": ORANGE, "size": 8, "line": {"width": 1, "color": "black"}},
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
    }
    return [points]


def running_mean(values: FloatArray) -> FloatArray:
    """Mean of a window around each value, which is cut off at both ends, [T].

    Example:
        >>> running_mean(np.arange(4.0)).tolist()
        [0.5, 1.0, 2.0, 2.5]
    """
    reach = max(1, len(values) // SMOOTHED // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - reach, 0)
    end = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    mean: FloatArray = (sums[end] - sums[start]) / (end - start)
    return mean


def thin(steps: IntArray, values: FloatArray) -> tuple[IntArray, FloatArray]:
    """Keep at most a thousand points, evenly spread, with the first and the last."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    chosen = np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int)
    return steps[chosen], values[chosen]
