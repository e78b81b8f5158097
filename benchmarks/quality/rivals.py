"""Other methods beside DR-LoRA: does one beat it, and does the order hold on held-out tasks?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from scipy.stats import kendalltau

from benchmarks.quality.cells import Rows, interval
from benchmarks.quality.claims import CLAIMED, DRLORA, UNIFORM, compare
from benchmarks.quality.factors import main_methods
from benchmarks.quality.runs import Results, Setting


def rivals(results: Results) -> Rows:
    """Every other method against DR-LoRA, where it was developed and on held-out tasks."""
    words = {-1: "better than DR-LoRA", 1: "worse than DR-LoRA", 0: "undecided"}
    rows = []
    for name in _equals(results):
        known, held_out = (
            compare(results, name, DRLORA, settings=results.primary(held_out=which))
            for which in (False, True)
        )
        if name != DRLORA and (known.groups or held_out.groups):
            row = {
                "Method": name,
                "Development": interval(known.here),
                "Held out": interval(held_out.here),
                "Held out, so": words[held_out.here.side] if held_out.groups else "not run",
            }
            rows.append((known.here.mean if known.groups else math.inf, row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def orders(results: Results) -> tuple[Rows, float]:
    """Methods by their mean gap to uniform, in development and held out; Kendall's tau.

    The methods of the claims that were held out choose the settings: those that have them all. The
    methods shown are those that ran in all these settings.
    """
    claimed = CLAIMED & set(results.methods(results.primary(held_out=True)))
    known, held_out = (
        [s for s in results.primary(held_out=which) if claimed <= results.cells[s].keys()]
        for which in (False, True)
    )
    names = [n for n in _equals(results) if all(n in results.cells[s] for s in known + held_out)]
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
    """Mean difference to uniform over the settings, of the methods that can run in them."""
    found = {name: results.groups(name, UNIFORM, settings=settings) for name in names}
    return {
        name: float(np.mean([group.mean() for group in groups.values()]))
        for name, groups in found.items()
        if groups and len(groups) == len(settings)
    }


def _equals(results: Results) -> list[str]:
    """Methods that are given the same budget, options of DR-LoRA apart."""
    bounds = {
        name
        for cells in results.cells.values()
        for name, cell in cells.items()
        if cell.method.upper_bound
    }
    return [n for n in main_methods(results, results.settings()) if n not in bounds]
