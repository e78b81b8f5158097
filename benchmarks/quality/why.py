"""Why growing helps: methods that test one explanation each, against their references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from benchmarks.quality.cells import Rows, interval
from benchmarks.quality.claims import EARLY, UNIFORM, compare
from benchmarks.quality.methods import METHODS
from benchmarks.quality.runs import Cell, Results, Setting

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
LARGE = 4
"""Twice the mean rank of the study."""
ONLY_HERE = frozenset(
    name for methods in EXPLANATIONS.values() for name in methods if name not in METHODS
)
"""Methods that test an explanation and nothing else; the tables of other pages leave them out."""


def effects(results: Results) -> Rows:
    """Every method minus the references: means over ``full_settings``."""
    settings = full_settings(results)
    return [
        {
            "Explanation": title if first else "",
            "Method": f"`{name}`",
            "What it does": text,
            **{f"Minus `{base}`": _effect(results, name, base, settings) for base in REFERENCES},
        }
        for title, methods in EXPLANATIONS.items()
        for first, name, text in _that_ran(results, methods)
    ]


def _effect(results: Results, name: str, base: str, settings: Iterable[Setting]) -> str:
    if name == base:
        return "-"
    return interval(compare(results, name, base, settings=settings).here)


def by_setting(results: Results) -> Rows:
    """All methods minus uniform, with their learning rates, in every setting of the study."""
    settings = study_settings(results)
    return [
        {
            "Method": f"`{name}`",
            **{results.label(setting): _cell(results, name, setting) for setting in settings},
        }
        for methods in EXPLANATIONS.values()
        for _, name, _ in _that_ran(results, methods)
    ]


def _cell(results: Results, name: str, setting: Setting) -> str:
    if name not in results.cells[setting]:
        return "-"
    rate = results.cells[setting][name].rate
    return f"{_effect(results, name, UNIFORM, [setting])} at {rate:g}"


def collapse(results: Results) -> Rows:
    """Final effective rank of the experts with at least ``LARGE`` rank dimensions, by setting."""
    rows = []
    for methods in EXPLANATIONS.values():
        for _, name, _ in _that_ran(results, methods):
            by_label = {
                results.label(setting): large_experts(results.cells[setting][name])
                for setting in study_settings(results)
                if name in results.cells[setting]
            }
            cells = {label: f"{e:.1f} of {r:.1f}" for label, (e, r) in by_label.items() if r}
            if cells:
                every = {results.label(s): "-" for s in study_settings(results)}
                rows.append({"Method": f"`{name}`", **every, **cells})
    return rows


def large_experts(cell: Cell) -> tuple[float, float]:
    """Mean effective rank and mean rank of the large experts; 0 if there are none."""
    pairs = [
        (effective, rank)
        for record in cell.chosen().values()
        for layer, values in record.effective_ranks.items()
        for effective, rank in zip(values, record.ranks[layer], strict=True)
        if rank >= LARGE
    ]
    effective, rank = np.mean(pairs, axis=0) if pairs else (0.0, 0.0)
    return float(effective), float(rank)


def study_settings(results: Results) -> list[Setting]:
    """Settings in which methods of the explanations ran that no other study has."""
    return [s for s in results.primary() if "known_ranks" in results.cells[s]]


def full_settings(results: Results) -> list[Setting]:
    """The settings of the study that have all methods that ran at all."""
    settings = study_settings(results)
    names = {n for each in EXPLANATIONS.values() for n in each} & set(results.methods(settings))
    return [s for s in settings if names <= results.cells[s].keys()]


def _that_ran(results: Results, methods: Mapping[str, str]) -> list[tuple[bool, str, str]]:
    """(True for the first, name, what it does) of the methods that ran."""
    ran = results.methods(study_settings(results))
    names = [name for name in methods if name in ran]
    return [(name == names[0], name, methods[name]) for name in names]
