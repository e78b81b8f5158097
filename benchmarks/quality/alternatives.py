"""Other methods against DR-LoRA, and their ranking on development and held-out tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from scipy.stats import kendalltau

from benchmarks.quality.cells import Rows, better_or_worse, interval
from benchmarks.quality.claims import CLAIMED, DRLORA, UNIFORM, compare
from benchmarks.quality.factors import main_methods
from benchmarks.quality.runs import Results, Setting


def alternatives(results: Results) -> Rows:
    """Every other method against DR-LoRA, on development and held-out tasks."""
    rows = []
    for name in _same_budget(results):
        known, held_out = (
            compare(results, name, DRLORA, settings=results.primary(held_out=which))
            for which in (False, True)
        )
        if name != DRLORA and (known.groups or held_out.groups):
            row = {
                "Method": name,
                "Development": interval(known.here),
                "Held out": interval(held_out.here),
                "Verdict, held out": better_or_worse(held_out.here),
            }
            rows.append((known.here.mean if known.groups else math.inf, row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def ranking(results: Results) -> tuple[Rows, float]:
    """Rank of the methods by mean test loss, in development and held out, and Kendall's tau.

    Uses the settings that have every claimed method with held-out runs, and the methods that ran
    in all of these settings.
    """
    claimed = CLAIMED & set(results.methods(results.primary(held_out=True)))
    known, held_out = (
        [s for s in results.primary(held_out=which) if claimed <= results.cells[s].keys()]
        for which in (False, True)
    )
    names = [
        n for n in _same_budget(results) if all(n in results.cells[s] for s in known + held_out)
    ]
    gaps = [_gaps(results, names, settings) for settings in (known, held_out)]
    both = sorted(gaps[0].keys() & gaps[1].keys(), key=gaps[0].__getitem__)
    if len(both) < 2:
        return [], math.nan
    place = {name: i for i, name in enumerate(sorted(both, key=gaps[1].__getitem__), start=1)}
    rows = [
        {
            "Method": name,
            f"Development ({len(known)} settings)": f"{i}. ({gaps[0][name]:+.3f})",
            f"Held out ({len(held_out)} settings)": f"{place[name]}. ({gaps[1][name]:+.3f})",
        }
        for i, name in enumerate(both, start=1)
    ]
    values = [np.array([gap[name] for name in both]) for gap in gaps]
    return rows, float(kendalltau(*values).statistic)


def _gaps(results: Results, names: Iterable[str], settings: list[Setting]) -> dict[str, float]:
    """Mean test loss minus that of uniform, for methods that ran in all the settings."""
    found = {name: results.groups(name, UNIFORM, settings=settings) for name in names}
    return {
        name: float(np.mean([group.mean() for group in groups.values()]))
        for name, groups in found.items()
        if groups and len(groups) == len(settings)
    }


def _same_budget(results: Results) -> list[str]:
    """Methods with the same budget, without the variants of a single option."""
    bounds = {
        name
        for cells in results.cells.values()
        for name, cell in cells.items()
        if cell.method.upper_bound
    }
    return [n for n in main_methods(results, results.settings()) if n not in bounds]
