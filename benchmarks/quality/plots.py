"""Plotly figures of a study, and the self-contained page that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as objects
from plotly.subplots import make_subplots

from benchmarks.quality.claims import DRLORA, UNIFORM, Relevance
from benchmarks.quality.factors import (
    COMPONENTS,
    against_reference,
    factors,
    reference_value,
    shown,
)
from benchmarks.quality.runs import Cell, Results, differences
from benchmarks.quality.statistics import Estimate, estimate


def page(results: Results, relevance: Relevance | None = None) -> str:
    """All figures as one HTML page that works offline."""
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=index == 0)
        for index, figure in enumerate(figures(results, relevance))
    ]
    head = "<meta charset=utf-8><title>Quality of DR-LoRA</title>"
    body = "".join(parts) or "<p>No runs.</p>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def figures(results: Results, relevance: Relevance | None = None) -> Iterator[Any]:
    """Yield all figures for which there are runs."""
    for setting, cells in results.cells.items():
        if UNIFORM in cells:
            yield paired_differences(results.label(setting), cells)
        yield loss_curves(results.label(setting), cells)
        if DRLORA in cells and cells[DRLORA].chosen():
            known = relevance(setting.model, setting.task) if relevance else None
            yield rank_map(results.label(setting), cells[DRLORA], known)
    for option in factors(results):
        if option not in COMPONENTS:
            yield sensitivity(results, option)


def paired_differences(label: str, cells: dict[str, Cell]) -> Any:
    """Test loss minus that of uniform, with 95 % intervals; the dots are seeds."""
    figure = objects.Figure()
    gaps = {n: differences(cell, cells[UNIFORM]) for n, cell in cells.items() if n != UNIFORM}
    for name, values in sorted(gaps.items(), key=lambda item: -item[1].sum()):
        if not values.size:
            continue
        found = estimate([values])
        figure.add_scatter(
            x=values, y=[name] * values.size, mode="markers", opacity=0.4, marker_color="gray"
        )
        figure.add_scatter(x=[found.mean], y=[name], error_x=_bars(found), marker_color="black")
    figure.add_vline(x=0, line_dash="dot")
    figure.update_layout(showlegend=False)
    return _styled(figure, f"{label}: test loss minus that of uniform", "nats", "")


def _bars(found: Estimate) -> dict[str, Any]:
    if not np.isfinite(found.low):
        return {}
    above, below = found.high - found.mean, found.mean - found.low
    return {"type": "data", "symmetric": False, "array": [above], "arrayminus": [below]}


def loss_curves(label: str, cells: dict[str, Cell]) -> Any:
    """Validation loss by step, mean over seeds, each method at its best learning rate."""
    figure = objects.Figure()
    for name, cell in cells.items():
        curves = [np.array(record.curve) for record in cell.chosen().values() if record.curve]
        if curves:
            mean = np.mean(curves, axis=0)
            figure.add_scatter(x=mean[:, 0], y=mean[:, 1], name=name, mode="lines+markers")
    return _styled(figure, f"{label}: validation loss", "optimizer step", "nats")


def mean_ranks(cell: Cell) -> dict[str, np.ndarray]:
    """Mean final rank of each expert over the seeds, [N] by layer."""
    records = list(cell.chosen().values())
    return {
        layer: np.mean([record.ranks[layer] for record in records], axis=0)
        for layer in records[0].ranks
    }


def rank_map(label: str, cell: Cell, known: Any) -> Any:
    """Mean final rank of each expert, and its relevance if that is known."""
    maps = {"mean final rank": mean_ranks(cell)} | ({"relevance": dict(known)} if known else {})
    figure = make_subplots(cols=len(maps), subplot_titles=list(maps), shared_yaxes=True)
    for column, layers in enumerate(maps.values(), start=1):
        grid = [list(map(float, values)) for values in layers.values()]
        heat = objects.Heatmap(z=grid, y=list(layers), zmin=0, showscale=column == 1)
        figure.add_trace(heat, row=1, col=column)
    return _styled(figure, f"{label}: {cell.method.name}", "expert", "")


def sensitivity(results: Results, option: str) -> Any:
    """Effect of an option on the test loss of DR-LoRA; the diamond is the default."""
    figure = objects.Figure()
    variants = factors(results)[option]
    own = reference_value(option, next(iter(variants)), results)
    points = [(own, Estimate(0.0, 0.0, 0.0, 1))]
    for name, value in variants.items():
        found = against_reference(results, name).here
        if found.count:
            points.append((shown(value), found))
    for value, found in points:
        symbol = "diamond" if (value, found) == points[0] else "circle"
        bars = _bars(found)
        figure.add_scatter(
            x=[value], y=[found.mean], error_y=bars, marker={"symbol": symbol, "color": "black"}
        )
    figure.add_hline(y=0, line_dash="dot")
    figure.update_layout(showlegend=False)
    return _styled(figure, f"Sensitivity to {option}", option, "effect on test loss, nats")


def _styled(figure: Any, title: str, x: str, y: str) -> Any:
    figure.update_layout(title=title, template="plotly_white")
    return figure.update_xaxes(title=x).update_yaxes(title=y)
