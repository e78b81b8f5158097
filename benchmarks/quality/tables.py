"""Tables of the methods: by setting, by learning rate, and by their final ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from benchmarks.quality.cells import Rows, interval, spread, wins
from benchmarks.quality.claims import (
    UNIFORM,
    Relevance,
    compare,
    correlations,
)
from benchmarks.quality.factors import main_methods
from benchmarks.quality.runs import Cell, Results, Setting, differences, exact_match, test_loss
from benchmarks.quality.statistics import Estimate, estimate, sign_flip_p


def overview(results: Results, settings: Iterable[Setting]) -> Rows:
    """Methods x settings: test loss minus that of uniform, bold if the interval excludes 0.

    Ordered by the number of settings that a method ran in, then by its mean.
    """
    settings = [s for s in settings if UNIFORM in results.cells[s]]
    rows = []
    for name in main_methods(results, settings):
        groups = results.groups(name, UNIFORM, settings=settings)
        if name == UNIFORM or not groups:
            continue
        cells = {
            results.label(s): _bold(estimate([groups[s]])) if s in groups else "-" for s in settings
        }
        pooled = compare(results, name, UNIFORM, settings=settings)
        mean = {"Mean": interval(pooled.here), "Settings": str(len(pooled.groups))}
        order = (-len(pooled.groups), pooled.here.mean)
        rows.append((order, {"Method": name, **cells, **mean}))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _bold(found: Estimate) -> str:
    mean = f"{found.mean:+.3f}"
    return f"**{mean}**" if found.side else mean


def methods(results: Results, setting: Setting) -> Rows:
    """The methods of a setting at their best learning rates, the best first; see main_methods."""
    cells = results.cells[setting]
    shown = {name: cells[name] for name in main_methods(results, [setting])}
    ordered = sorted(shown, key=lambda name: _mean(shown[name].values(test_loss)))
    return [_method(shown[name], cells.get(UNIFORM)) for name in ordered]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.inf


def _method(cell: Cell, uniform: Cell | None) -> dict[str, str]:
    name = cell.method.name + (" (upper bound)" if cell.method.upper_bound else "")
    own = uniform is None or cell is uniform
    against = np.array([]) if own else differences(cell, uniform)
    row = {
        "Method": name,
        "Test loss": spread(cell.values(test_loss)),
        "Minus uniform": interval(estimate([against])),
        "Seeds better": wins(against),
        "p": f"{sign_flip_p([against]):.3f}" if against.size else "-",
        "Exact match": spread(cell.values(exact_match), 1),
        "Learning rate": _rate(cell),
        "Total rank": _budget(cell),
        "Trained parameters": _range(r.trained_parameters for r in cell.chosen().values()),
    }
    if cell.refused:
        row["Test loss"] = "refused"
    elif cell.diverged():
        row["Test loss"] += f" ({cell.diverged()} diverged, excluded)"
    return row


def _rate(cell: Cell) -> str:
    if cell.rate is None:
        return "-"
    return f"{cell.rate:g}" + (" (edge of the grid)" if cell.at_edge else "")


def _budget(cell: Cell) -> str:
    totals = sorted({(r.total_rank, r.budget) for r in cell.chosen().values()})
    return (
        ", ".join(
            f"{total}" if total == budget or cell.method.upper_bound else f"{total}, NOT {budget}"
            for total, budget in totals
        )
        or "-"
    )


def _range(counts: Iterable[int]) -> str:
    return ", ".join(f"{count:,}" for count in sorted(set(counts))) or "-"


def rates(results: Results, setting: Setting) -> Rows:
    """Test loss minus that of uniform at every learning rate, the same for both methods."""
    cells = results.cells[setting]
    if UNIFORM not in cells:
        return []
    grid = sorted(cells[UNIFORM].runs)
    rows = []
    for name in main_methods(results, [setting]):
        cell = cells[name]
        gaps = {rate: differences(cell, cells[UNIFORM], rate=rate) for rate in grid}
        if name != UNIFORM and len(grid) > 1 and sum(gap.size > 0 for gap in gaps.values()) > 1:
            shown = {
                f"{rate:g}": f"{gap.mean():+.3f} ({wins(gap)})" if gap.size else "-"
                for rate, gap in gaps.items()
            }
            rows.append({"Method": name, **shown})
    return rows


def agreement(results: Results, method: str, base: str) -> Rows:
    """Difference of two implementations of the same method, by setting."""
    return [
        {
            "Setting": results.label(setting),
            f"{method} - {base}": interval(found := estimate([group])),
            "Largest difference": f"{np.abs(group).max():.1e}",
            "Verdict": _agree(found),
        }
        for setting, group in results.groups(method, base).items()
    ]


def _agree(found: Estimate) -> str:
    if math.isinf(found.low):
        return "too few seeds"
    return "different" if found.side else "no clear difference"


def edges(results: Results) -> str:
    """How often the best learning rate is the smallest or largest of the grid."""
    swept = [cell for by in results.cells.values() for cell in by.values() if len(cell.runs) > 1]
    at_edge = sum(cell.at_edge for cell in swept)
    return (
        f"In {at_edge} of {len(swept)} learning-rate sweeps (one per method and setting), the best "
        "rate is at the edge of the grid; a rate outside the grid might be better."
    )


def rank_correlations(results: Results, method: str, relevance: Relevance | None) -> Rows:
    """Spearman correlation of final ranks with every signal, by setting."""
    table = correlations(results, method, relevance)
    columns = ("f", "g", "f g", "relevance")
    return [
        {
            "Setting": results.label(setting),
            "Seeds": str(max(values.size for values in by_signal.values())),
            **{
                name: interval(estimate([by_signal[name]]), 2) if name in by_signal else "-"
                for name in columns
            },
        }
        for setting, by_signal in table.items()
    ]


def relevance_by_method(results: Results, relevance: Relevance) -> Rows:
    """Spearman correlation of final ranks with the known relevance: methods x settings."""
    names = main_methods(results, results.settings())
    by_method = {name: correlations(results, name, relevance) for name in names}
    known = [
        setting
        for setting in results.settings()
        if any("relevance" in table.get(setting, {}) for table in by_method.values())
    ]
    rows = []
    for name, table in by_method.items():
        found = {s: table.get(s, {}).get("relevance", np.array([])) for s in known}
        if any(values.size for values in found.values()):
            cells = {results.label(s): interval(estimate([v]), 2) for s, v in found.items()}
            rows.append({"Method": name, **cells})
    return rows
