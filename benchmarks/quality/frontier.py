"""Loss against trained parameters: the methods at several budgets of the same tasks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.quality.cells import Rows, interval
from benchmarks.quality.claims import EARLY, UNIFORM
from benchmarks.quality.runs import Cell, Results, Setting, differences
from benchmarks.quality.statistics import estimate

WHOLE = 8
"""Mean rank of the largest budget."""
FROM_1 = "early_from_1"
METHODS = (UNIFORM, EARLY, FROM_1, "staggered", "early_zero", "sieve")
Budgets = Mapping[int, Setting]
"""A setting by its r_target."""


def budgets(results: Results) -> dict[str, Budgets]:
    """The settings of each model and task that differ in the budget alone, with ``WHOLE``."""
    found: dict[tuple[str, str], dict[int, Setting]] = {}
    for setting in results.settings(held_out=False):
        training = setting.training
        if training.r_max == 4 * training.r_target and "sieve" in results.cells[setting]:
            found.setdefault((setting.model, setting.task), {})[training.r_target] = setting
    return {
        by_rank[WHOLE].name: dict(sorted(by_rank.items()))
        for by_rank in found.values()
        if WHOLE in by_rank
    }


def against_whole(results: Results) -> Rows:
    """Each method at each budget minus uniform LoRA at the whole one: means over the tasks."""
    every = list(budgets(results).values())
    rows = []
    for rank in sorted({rank for by_rank in every for rank in by_rank}):
        row = {"Budget": f"{rank}/{WHOLE}", "Parameters": _parameters(results, every, rank)}
        for name in METHODS:
            gaps = [
                differences(cell, results.cells[by_rank[WHOLE]][UNIFORM])
                for by_rank in every
                if rank in by_rank and (cell := results.cells[by_rank[rank]].get(name))
            ]
            row[f"`{name}`"] = interval(estimate([gap for gap in gaps if gap.size]))
        rows.append(row)
    return rows


def from_rank_1(results: Results) -> Rows:
    """At the whole budget: each method minus early growth from half of it, by setting."""
    settings = [
        s for s in results.settings() if s.training.r_target == WHOLE and FROM_1 in results.cells[s]
    ]
    rows = []
    for name in (UNIFORM, FROM_1, "staggered"):
        row = {"Method": f"`{name}`"}
        for setting in settings:
            cells = results.cells[setting]
            gap = differences(cells[name], cells[EARLY]) if name in cells else np.array([])
            title = setting.name + (", held out" if setting.held_out else "")
            row[title] = interval(estimate([gap])) if gap.size else "-"
        rows.append(row)
    return rows if settings else []


def by_task(results: Results, name: str) -> Rows:
    """Mean test loss of each method at each budget of a task, at its best learning rate."""
    return [
        {
            "Method": f"`{method}`",
            **{
                f"{rank}/{WHOLE}": _loss(results.cells[setting].get(method))
                for rank, setting in budgets(results)[name].items()
            },
        }
        for method in METHODS
    ]


def _parameters(results: Results, every: list[Budgets], rank: int) -> str:
    cells = [results.cells[by_rank[rank]][UNIFORM] for by_rank in every if rank in by_rank]
    counts = {r.trained_parameters for cell in cells for r in cell.chosen().values()}
    return " or ".join(f"{count:,}" for count in sorted(counts))


def _loss(cell: Cell | None) -> str:
    values = np.array([]) if cell is None else cell.values(lambda record: record.test_loss)
    return f"{values.mean():.3f}" if values.size else "-"
