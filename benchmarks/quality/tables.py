"""The tables of the report: rows of plain text cells, made from the runs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from benchmarks.quality.cells import Rows, interval, spread, wins
from benchmarks.quality.claims import (
    CLAIMS,
    DRLORA,
    UNIFORM,
    Comparison,
    Relevance,
    compare,
    correlations,
    verdicts,
)
from benchmarks.quality.factors import main_methods
from benchmarks.quality.runs import Cell, Results, Setting, differences, exact_match, test_loss
from benchmarks.quality.statistics import Estimate, estimate, kendall, sign_flip_p

# -- claims --------------------------------------------------------------------------------------


def claims(results: Results) -> Rows:
    """Every claim: what the paper reports, what the runs show, the verdict."""
    rows = []
    for claim in CLAIMS:
        loss, match, by_loss, by_match = verdicts(results, claim)
        rows.append(
            {
                "Claim": claim.text,
                "Paper": claim.paper,
                "Here, exact match (points)": interval(match.here, 1),
                "Verdict by exact match": by_match,
                "Here, test loss (nats)": interval(loss.here),
                "Verdict by test loss": by_loss,
            }
        )
    return rows


def evidence(results: Results) -> Rows:
    """The numbers behind the verdicts by test loss."""
    return [
        {"Comparison": f"{claim.method} - {claim.base}", **_evidence(found)}
        for claim in CLAIMS
        if (found := compare(results, claim.method, claim.base)).groups
    ]


def _evidence(found: Comparison) -> dict[str, str]:
    lower, higher, neither = found.sides()
    runs = found.here.count
    return {
        "Settings": str(len(found.groups)),
        "These settings": interval(found.here),
        "Settings like these": interval(found.beyond),
        "Difference / noise": f"{found.here.mean / found.noise:+.1f}" if found.noise else "-",
        "p": f"{found.p:.4f}",
        "Runs won": f"{found.wins}/{runs}",
        "Settings better, worse, undecided": f"{lower}, {higher}, {neither}",
    }


# -- methods by setting --------------------------------------------------------------------------


def overview(results: Results, settings: Iterable[Setting]) -> Rows:
    """Methods x settings: test loss against uniform; in bold where its interval leaves out 0."""
    settings = [s for s in settings if UNIFORM in results.cells[s]]
    rows = []
    for name in main_methods(results, settings):
        groups = results.groups(name, UNIFORM, settings=settings)
        if name == UNIFORM or not groups:
            continue
        cells = {s.label: _bold(estimate([groups[s]])) if s in groups else "-" for s in settings}
        pooled = compare(results, name, UNIFORM, settings=settings)
        rows.append({"Method": name, **cells, "Mean": interval(pooled.here)})
    return rows


def _bold(found: Estimate) -> str:
    mean = f"{found.mean:+.3f}"
    return f"**{mean}**" if found.side else mean


# -- one setting ---------------------------------------------------------------------------------


def methods(results: Results, setting: Setting) -> Rows:
    """All methods of a setting at their best learning rates, best first; options apart."""
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
        "Against uniform": interval(estimate([against])),
        "Wins": wins(against),
        "p": f"{sign_flip_p([against]):.3f}" if against.size else "-",
        "Exact match": spread(cell.values(exact_match), 1),
        "Rate": _rate(cell),
        "Total rank": _budget(cell),
    }
    if cell.refused:
        row["Test loss"] = f"cannot run: {cell.refused}"
    elif cell.diverged():
        row["Test loss"] += f" ({cell.diverged()} diverged, left out)"
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


def rates(results: Results, setting: Setting) -> Rows:
    """Test loss against uniform at every learning rate that both tried; nothing is tuned here."""
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
    """Two implementations of the same thing: their difference in every setting."""
    return [
        {
            "Setting": setting.label,
            f"{method} - {base}": interval(found := estimate([group])),
            "Largest of a seed": f"{np.abs(group).max():.3f}",
            "So": "they differ" if found.side else "no difference found",
        }
        for setting, group in results.groups(method, base).items()
    ]


def rivals(results: Results) -> Rows:
    """Every other method against DR-LoRA, where it was developed and on held-out tasks."""
    rows = []
    for name in main_methods(results, results.settings()):
        known, held_out = (
            compare(results, name, DRLORA, settings=results.settings(held_out=which))
            for which in (False, True)
        )
        if name != DRLORA and (known.groups or held_out.groups):
            words = {-1: "better than DR-LoRA", 1: "worse than DR-LoRA", 0: "undecided"}
            rows.append(
                {
                    "Method": name,
                    "Development": interval(known.here),
                    "Held out": interval(held_out.here),
                    "Held out, so": words[held_out.here.side] if held_out.groups else "not run",
                }
            )
    return rows


def edges(results: Results) -> str:
    """How often the best learning rate was the smallest or largest that was tried."""
    swept = [cell for by in results.cells.values() for cell in by.values() if len(cell.runs) > 1]
    at_edge = sum(cell.at_edge for cell in swept)
    return (
        f"Of {len(swept)} sweeps (a method in a setting), {at_edge} have their best rate at the "
        "edge of the grid; there a method might do better with another rate."
    )


# -- ranks ---------------------------------------------------------------------------------------


def rank_correlations(results: Results, method: str, relevance: Relevance | None) -> Rows:
    """Spearman of final ranks with every signal, in every setting of a method."""
    table = correlations(results, method, relevance)
    columns = ("f", "g", "f g", "relevance")
    return [
        {
            "Setting": setting.label,
            "Seeds": str(max(values.size for values in by_signal.values())),
            **{
                name: interval(estimate([by_signal[name]]), 2) if name in by_signal else "-"
                for name in columns
            },
        }
        for setting, by_signal in table.items()
    ]


def relevance_by_method(results: Results, relevance: Relevance) -> Rows:
    """Spearman of final ranks with the known relevance, for every method, over all settings."""
    rows = []
    for name in results.methods():
        table = correlations(results, name, relevance)
        groups = [values["relevance"] for values in table.values() if "relevance" in values]
        if groups:
            rows.append({"Method": name, "Rank with relevance": interval(estimate(groups), 2)})
    return rows


# -- order ---------------------------------------------------------------------------------------


def orders(results: Results) -> tuple[Rows, float]:
    """Methods by their mean gap to uniform, in development and held out; Kendall's tau.

    The methods are those of every held-out setting; of development, the settings that have them
    all.
    """
    held_out = results.settings(held_out=True)
    seen = set(results.methods(results.settings(held_out=False)))
    names = [n for n in results.methods(held_out) if n in seen]
    names = [n for n in names if all(n in results.cells[s] for s in held_out)]
    known = [s for s in results.settings(held_out=False) if {*names} <= results.cells[s].keys()]
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
    return rows, kendall(values[0], values[1])


def _gaps(results: Results, names: Iterable[str], settings: list[Setting]) -> dict[str, float]:
    """Mean difference to uniform over the settings, of the methods that can run in them."""
    found = {name: results.groups(name, UNIFORM, settings=settings) for name in names}
    return {
        name: float(np.mean([group.mean() for group in groups.values()]))
        for name, groups in found.items()
        if groups and len(groups) == len(settings)
    }
