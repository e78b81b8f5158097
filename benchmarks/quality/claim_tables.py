"""Tables about the claims: verdicts, the evidence behind them, and other training settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.cells import Rows, interval
from benchmarks.quality.claims import (
    ALL_CLAIMS,
    DRLORA,
    EARLY,
    UNIFORM,
    Claim,
    Comparison,
    compare,
    compare_claim,
    verdict,
)
from benchmarks.quality.factors import overrides
from benchmarks.quality.routing import entropy
from benchmarks.quality.runs import RANK, Results, Setting, exact_match
from benchmarks.quality.statistics import estimate
from benchmarks.quality.why import ONLY_HERE

ORDER = (UNIFORM, DRLORA, EARLY)
NAMED = 2
"""A cell names at most this many settings and counts the others."""


def claims(results: Results, chosen: Iterable[Claim]) -> Rows:
    """Effect, verdict and exceptions of every claim."""
    rows = []
    for claim in chosen:
        loss = compare_claim(results, claim)
        match = compare_claim(results, claim, exact_match)
        rows.append(
            {
                "Claim": claim.text,
                "Test loss": interval(loss.here),
                "Runs better": f"{loss.wins} of {loss.here.count}",
                "Settings": str(len(loss.groups)),
                "Verdict": verdict(loss),
                "Exceptions": exceptions(loss),
                "Exact match": interval(match.here, 1),
            }
        )
    return rows


def exceptions(found: Comparison) -> str:
    """Settings in which the first method is worse, and those without a clear difference."""
    parts = [
        f"{word}: {_listed([setting.name for setting in settings])}"
        for word, settings in (("worse", found.on_side(1)), ("unclear", found.on_side(0)))
        if settings
    ]
    return "; ".join(parts) or "-"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} settings"


def evidence(results: Results) -> Rows:
    """The figures behind the verdicts by test loss."""
    rows = []
    for claim in ALL_CLAIMS:
        found = compare_claim(results, claim)
        only = compare_claim(results, claim, held_out=True)
        if found.groups:
            rows.append(
                {"Comparison": _name(claim), **_evidence(found), "Held out": interval(only.here)}
            )
    return rows


def exact_matches(results: Results) -> Rows:
    """The claims by exact match instead of test loss."""
    rows = []
    for claim in ALL_CLAIMS:
        found = compare_claim(results, claim, exact_match)
        if found.groups:
            rows.append(
                {
                    "Comparison": _name(claim),
                    "Seeds resampled": interval(found.here, 1),
                    "Settings resampled": interval(found.beyond, 1),
                    "Verdict": verdict(found, lower_is_better=False),
                }
            )
    return rows


def _name(claim: Claim) -> str:
    rank = "" if claim.rank == RANK else f", mean rank {claim.rank}"
    return f"{claim.method} - {claim.base}{rank}"


def _evidence(found: Comparison) -> dict[str, str]:
    return {
        "Settings": str(len(found.groups)),
        "Seeds resampled": interval(found.here),
        "Settings resampled": interval(found.beyond),
        "Effect / seed noise": f"{found.here.mean / found.noise:+.1f}" if found.noise > 0 else "-",
        "p": f"{found.p:.4f}",
        "Runs better": f"{found.wins}/{found.here.count}",
        "Settings better, worse, unclear": ", ".join(
            str(len(found.on_side(side))) for side in (-1, 1, 0)
        ),
    }


def same_change(results: Results) -> Rows:
    """Variants of DR-LoRA against uniform LoRA with the same variation (betas, router)."""
    rows = []
    for base, changes in _changed_uniforms(results).items():
        for name in (each for each in results.methods() if each not in ONLY_HERE):
            method = next(by[name].method for by in results.cells.values() if name in by)
            fits = all(overrides(method).get(key) == value for key, value in changes.items())
            found = compare(results, name, base, settings=results.settings())
            if name != base and fits and found.groups:
                rows.append({"Comparison": f"{name} - {base}", **_evidence(found)})
    return rows


def _changed_uniforms(results: Results) -> Mapping[str, dict[str, Any]]:
    """Variants of uniform LoRA: name to the options other than the policy."""
    found = {}
    for cells in results.cells.values():
        for name, cell in cells.items():
            options = overrides(cell.method)
            if options.pop("policy", None) == "uniform" and options and name not in ONLY_HERE:
                found[name] = options
    return found


def other_trainings(results: Results) -> Rows:
    """Late and early growth against uniform, for tasks that ran with several training settings."""
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
            "Used for the verdicts": "yes" if setting in primary else "no",
        }
        for setting in settings
        if any(setting in by for by in groups.values())
    ]


def _points(results: Results, setting: Setting) -> str:
    cells = results.cells[setting]
    values = (cells[name].values(exact_match) if name in cells else () for name in ORDER)
    return ", ".join(f"{np.mean(each):.1f}" if len(each) else "-" for each in values)


def concentration(results: Results) -> Rows:
    """Entropy of the routing and the gain of DR-LoRA, by setting; the lowest entropy first."""
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
