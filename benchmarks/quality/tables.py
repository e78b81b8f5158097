"""The tables of the report: rows of plain text cells, made from the runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.quality.cells import Rows, interval, spread, wins
from benchmarks.quality.claims import (
    CLAIMS,
    DRLORA,
    EARLY,
    UNIFORM,
    Comparison,
    Relevance,
    compare,
    correlations,
    verdicts,
)
from benchmarks.quality.factors import main_methods, overrides
from benchmarks.quality.routing import entropy
from benchmarks.quality.runs import Cell, Results, Setting, differences, exact_match, test_loss
from benchmarks.quality.statistics import Estimate, estimate, sign_flip_p

ORDER = (UNIFORM, DRLORA, EARLY)

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
    held_out = results.primary(held_out=True)
    rows = []
    for claim in CLAIMS:
        found = compare(results, claim.method, claim.base)
        only = compare(results, claim.method, claim.base, settings=held_out)
        if found.groups:
            name = f"{claim.method} - {claim.base}"
            rows.append(
                {"Comparison": name, **_evidence(found), "Held out only": interval(only.here)}
            )
    return rows


def _evidence(found: Comparison) -> dict[str, str]:
    lower, higher, neither = found.sides()
    runs = found.here.count
    return {
        "Settings": str(len(found.groups)),
        "These settings": interval(found.here),
        "Settings like these": interval(found.beyond),
        "Difference / noise": f"{found.here.mean / found.noise:+.1f}" if found.noise > 0 else "-",
        "p": f"{found.p:.4f}",
        "Runs won": f"{found.wins}/{runs}",
        "Settings better, worse, undecided": f"{lower}, {higher}, {neither}",
    }


# -- methods by setting --------------------------------------------------------------------------


def overview(results: Results, settings: Iterable[Setting]) -> Rows:
    """Methods x settings: test loss against uniform; in bold where its interval leaves out 0.

    Those that ran in most settings come first, and among them the best.
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
        mean = {"Mean": interval(pooled.here), "of settings": str(len(pooled.groups))}
        order = (-len(pooled.groups), pooled.here.mean)
        rows.append((order, {"Method": name, **cells, **mean}))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


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
        "Trained parameters": _range(r.trained_parameters for r in cell.chosen().values()),
    }
    if cell.refused:
        row["Test loss"] = "cannot run, see The runs"
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


def _range(counts: Iterable[int]) -> str:
    return ", ".join(f"{count:,}" for count in sorted(set(counts))) or "-"


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
            "Setting": results.label(setting),
            f"{method} - {base}": interval(found := estimate([group])),
            "Largest of a seed": f"{np.abs(group).max():.1e}",
            "So": _agree(found),
        }
        for setting, group in results.groups(method, base).items()
    ]


def same_change(results: Results) -> Rows:
    """Methods against uniform LoRA that was changed alike, such as in betas or the router."""
    rows = []
    for base, changes in _changed_uniforms(results).items():
        for name in results.methods():
            method = next(by[name].method for by in results.cells.values() if name in by)
            fits = all(overrides(method).get(key) == value for key, value in changes.items())
            found = compare(results, name, base, settings=results.settings())
            if name != base and fits and found.groups:
                rows.append({"Comparison": f"{name} - {base}", **_evidence(found)})
    return rows


def _changed_uniforms(results: Results) -> dict[str, dict[str, Any]]:
    """Uniform LoRA with changed options: name and the options beside the policy."""
    found = {}
    for cells in results.cells.values():
        for name, cell in cells.items():
            options = overrides(cell.method)
            if options.pop("policy", None) == "uniform" and options:
                found[name] = options
    return found


def _agree(found: Estimate) -> str:
    if math.isinf(found.low):
        return "too few seeds to tell"
    return "they differ" if found.side else "no difference found"


def other_trainings(results: Results) -> Rows:
    """Growth, late and early, against uniform where a model and task had several trainings."""
    primary = results.primary()
    several = {(s.model, s.task) for s in results.settings() if s not in primary}
    settings = [s for s in results.settings() if (s.model, s.task) in several]
    groups = {name: results.groups(name, UNIFORM, settings=settings) for name in (DRLORA, EARLY)}
    return [
        {
            "Setting": results.label(setting),
            **{
                f"{name} - {UNIFORM}": interval(estimate([by.get(setting, np.array([]))]))
                for name, by in groups.items()
            },
            f"Exact match of {', '.join(ORDER)}": _points(results, setting),
            "Counted in the verdicts": "yes" if setting in primary else "no",
        }
        for setting in settings
        if any(setting in by for by in groups.values())
    ]


def _points(results: Results, setting: Setting) -> str:
    cells = results.cells[setting]
    values = (cells[name].values(exact_match) if name in cells else () for name in ORDER)
    return ", ".join(f"{np.mean(each):.1f}" if len(each) else "-" for each in values)


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
    """Spearman of final ranks with the known relevance: methods x settings."""
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


def concentration(results: Results) -> Rows:
    """How even the routing is, and what DR-LoRA gains: a row per setting, most even last."""
    rows = []
    for setting, group in compare(results, DRLORA, UNIFORM).groups.items():
        runs = results.cells[setting][DRLORA].chosen().values()
        layers = [np.array(phi) for run in runs for phi in run.routing.values() if sum(phi) > 0]
        if layers:
            even = float(np.mean([entropy(phi) for phi in layers]))
            gain = {f"{DRLORA} - {UNIFORM}": interval(estimate([group]))}
            rows.append(
                (even, {"Setting": results.label(setting), "Entropy": f"{even:.3f}", **gain})
            )
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]
