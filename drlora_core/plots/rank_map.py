"""Figure: the rank of every expert, with a slider over the growth events."""

from __future__ import annotations

from typing import Any

import numpy as np

from drlora_core.plots.grid import color_axis, grid_layout, to_grid
from drlora_core.plots.style import RANKS, layer_labels, make_figure, to_short
from drlora_core.runs import Drawable, Run, as_run
from drlora_core.runs.history import evenly

MOST_FRAMES, MOST_CELLS = 20, 400_000  # frames, and experts x frames
MOST_DETAILS = 50_000  # experts x frames up to which every frame has f, g and S
MOST_EXPERTS = 30_000  # with more, no frame has them
SLIDER = 90  # pixels


def rank_map(run: Drawable) -> Any:
    """Draw the rank of every expert: a row per layer, a column per expert in index order.

    The slider shows the start and the ranks after each event (of many events, some); a trace for
    each, of which that of the saved adapter is visible. Hovering over an expert shows its rank and
    f, g and S, by which the event was decided; in a large run only at the end.
    """
    run = as_run(run)
    shown = sorted({*_choose_frames(len(run.events), run.recording.num_experts), run.kept})
    detailed = len(shown) * run.recording.num_experts <= MOST_DETAILS
    at_end = run.recording.num_experts <= MOST_EXPERTS
    frames = [
        {
            "type": "heatmap",
            "z": to_grid(run, run.ranks[number]),
            "y": layer_labels(list(run.layers)),
            "coloraxis": "coloraxis",
            "hoverongaps": False,
            "visible": number == run.kept,
            "name": f"step {run.events[number - 1].step}" if number else "start",
            **_hover(run, number, detailed or (at_end and number in (run.kept, shown[-1]))),
        }
        for number in shown
    ]
    layout = grid_layout(run, "Rank of every expert", SLIDER)
    layout["coloraxis"] = color_axis(RANKS, 0, max(1, int(run.ranks.max())), "rank")
    if len(shown) > 1:
        layout["sliders"] = [_slider(run, shown)]
    return make_figure(frames, layout)


def _choose_frames(events: int, experts: int) -> list[int]:
    """Numbers of the states to show: 0 is the start, k that after event k."""
    most = max(2, min(MOST_FRAMES, MOST_CELLS // experts))
    return evenly(events + 1, most)


def _hover(run: Run, number: int, detailed: bool) -> dict[str, Any]:
    text = "layer %{y}, expert %{x}<br>rank %{z}"
    history, ending = run.history, "<extra></extra>"
    if not detailed or not len(history.steps):
        return {"hovertemplate": text + ending}
    row = run.history_row(number)
    values = np.stack([signal[row] for signal in history.signals])
    return {
        "customdata": to_short(to_grid(run, values)),
        "hovertemplate": f"{text}<br>f %{{customdata[0]:.3g}}, g %{{customdata[1]:.3g}}, "
        f"S %{{customdata[2]:.3g}} at step {history.steps[row]}{ending}",
    }


def _slider(run: Run, shown: list[int]) -> dict[str, Any]:
    steps = [
        {
            "label": str(run.events[number - 1].step) if number else "0",
            "method": "update",
            "args": [{"visible": [other == number for other in shown]}],
        }
        for number in shown
    ]
    return {
        "active": shown.index(run.kept),
        "currentvalue": {"prefix": "after step ", "xanchor": "left"},
        "pad": {"t": 44, "b": 4},
        "steps": steps,
    }
