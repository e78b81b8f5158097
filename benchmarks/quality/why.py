"""Why growing helps: methods that test one explanation each, against their references."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.quality.cells import Rows, interval
from benchmarks.quality.claims import EARLY, UNIFORM, compare
from benchmarks.quality.runs import Results, Setting
from benchmarks.quality.statistics import estimate

HINDSIGHT = "hindsight"
REFERENCES = (UNIFORM, EARLY, HINDSIGHT)
EXPLANATIONS: Mapping[str, Mapping[str, str]] = {
    "References": {
        EARLY: "ranks grow from 1 at 8 events between 5 and 25 % of the steps",
        HINDSIGHT: "the final ranks of `early` from the start",
    },
    "Fresh rows": {
        "redraw_least": "`uniform`; at the events of `early`, the least important rows start anew",
        "redraw_random": "the same with random rows",
        "hindsight_redraw_extra": "`hindsight`; the rows that growth would have added start anew",
        "hindsight_reset_extra": "the same, but only their optimizer state starts anew",
    },
    "Step size of newborn rows": {
        "early_newborn_plain": "`early` without the correction of newborn rows",
        "early_newborn_warmup": "`early`; newborn rows also warm up over their first 10 steps",
    },
    "Scaling": {
        "early_scale_sqrt": "`early`, scaled by alpha / sqrt(r_i r_target)",
        "early_scale_rank": "`early`, scaled by alpha / r_i",
        "hindsight_scale_rank": "`hindsight`, scaled by alpha / r_i",
    },
    "Fewer rows at first": {
        "early_uniform_growth": "all experts grow evenly, at the events of `early`",
        "uniform_growth_one_event": "all experts grow at one event, halfway",
        "known_ranks_one_event": "one event halfway, to the final ranks of `early`",
    },
    "Order of experts": {
        "known_ranks": "events of `early` to the final ranks of `early`, in random order",
        "early_random": "`early` with random experts",
        "early_least_first": "`early`; the least salient experts grow first",
    },
    "Slow start": {
        "uniform_slow": "`uniform`; the learning rate warms up over 25 % of the steps",
    },
}
"""By explanation: methods and what they do."""


def effects(results: Results) -> list[tuple[str, Rows]]:
    """Each explanation with its methods minus the references.

    Means over the settings that have all methods of all explanations.
    """
    settings = full_settings(results)
    found = []
    for title, methods in EXPLANATIONS.items():
        rows = [
            {
                "Method": f"`{name}`",
                "What it does": text,
                **{
                    f"Minus `{base}`": "-"
                    if name == base
                    else interval(compare(results, name, base, settings=settings).here)
                    for base in REFERENCES
                },
            }
            for name, text in _that_ran(results, methods).items()
        ]
        if rows:
            found.append((title, rows))
    return found


def by_setting(results: Results) -> Rows:
    """All methods minus uniform in every setting of the study."""
    settings = study_settings(results)
    rows = []
    for methods in EXPLANATIONS.values():
        for name in _that_ran(results, methods):
            groups = results.groups(name, UNIFORM, settings=settings)
            cells = {
                results.label(s): interval(estimate([groups[s]])) if s in groups else "-"
                for s in settings
            }
            rows.append({"Method": f"`{name}`", **cells})
    return rows


def study_settings(results: Results) -> list[Setting]:
    """Settings in which methods of the explanations ran that no other study has."""
    return [s for s in results.primary() if "known_ranks" in results.cells[s]]


def full_settings(results: Results) -> list[Setting]:
    """The settings of the study that have all methods that ran at all."""
    settings = study_settings(results)
    names = {n for each in EXPLANATIONS.values() for n in each} & set(results.methods(settings))
    return [s for s in settings if names <= results.cells[s].keys()]


def _that_ran(results: Results, methods: Mapping[str, str]) -> dict[str, str]:
    ran = results.methods(study_settings(results))
    return {name: text for name, text in methods.items() if name in ran}
