"""Loss against trained parameters: the methods at several budgets of the same tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.quality.cells import Rows, interval
from benchmarks.quality.claims import EARLY, SPROUT, UNIFORM
from benchmarks.quality.pictures import curves
from benchmarks.quality.runs import Cell, Results, Setting, differences
from benchmarks.quality.statistics import Estimate, estimate

WHOLE = 8
"""Mean rank of the largest budget."""
METHODS = (UNIFORM, EARLY, SPROUT, "staggered", "early_zero", "sieve", "hellora")
MEASURED = Path(__file__).parents[1] / "results"
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


def gaps(results: Results) -> dict[str, dict[int, Estimate]]:
    """Each method at each budget minus uniform LoRA at the whole one: means over the tasks."""
    every = list(budgets(results).values())
    found: dict[str, dict[int, Estimate]] = {}
    for rank in sorted({rank for by_rank in every for rank in by_rank}):
        for name in METHODS:
            each = [
                differences(cell, results.cells[by_rank[WHOLE]][UNIFORM])
                for by_rank in every
                if rank in by_rank and (cell := results.cells[by_rank[rank]].get(name))
            ]
            if shown := [values for values in each if values.size]:
                found.setdefault(name, {})[rank] = estimate(shown)
    return found


def against_whole(results: Results) -> Rows:
    """The differences of :func:`gaps` with their intervals, and the parameters of each budget."""
    every = list(budgets(results).values())
    by_name = gaps(results)
    return [
        {
            "Budget": f"{rank}/{WHOLE}",
            "Parameters": _parameters(results, every, rank),
            **{
                f"`{name}`": interval(by_rank[rank]) if rank in by_rank else "-"
                for name, by_rank in by_name.items()
            },
        }
        for rank in sorted({rank for by_rank in every for rank in by_rank})
    ]


def figure(results: Results) -> str:
    """The differences of :func:`gaps` over the budget, in characters."""
    by_name = gaps(results)
    return curves({n: {rank: e.mean for rank, e in by.items()} for n, by in by_name.items()})


def from_rank_1(results: Results) -> Rows:
    """At the whole budget: each method minus early growth from half of it, by setting."""
    settings = [
        s for s in results.settings() if s.training.r_target == WHOLE and SPROUT in results.cells[s]
    ]
    rows = []
    for name in (UNIFORM, SPROUT, "staggered"):
        row = {"Method": f"`{name}`"}
        for setting in settings:
            cells = results.cells[setting]
            gap = differences(cells[name], cells[EARLY]) if name in cells else np.array([])
            title = setting.name + (", held out" if setting.held_out else "")
            row[title] = interval(estimate([gap])) if gap.size else "-"
        rows.append(row)
    return rows if settings else []


def costs() -> str:
    """Step time and memory by rank: the newest page of ``python -m benchmarks.frontier``."""
    newest = max(MEASURED.glob("frontier_*.md"), key=lambda path: path.stem.rpartition("_")[2])
    _, _, text = newest.read_text(encoding="utf-8").partition("\n")
    return text.strip()


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
