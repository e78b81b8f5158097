"""docs/results.md: written from the results files and the hand-written notes, nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.quality import factors, pictures, rivals, tables
from benchmarks.quality.cells import NOT_RUN, interval, markdown
from benchmarks.quality.claims import (
    DRLORA,
    EARLY,
    UNIFORM,
    Relevance,
    compare,
    correlations,
    relevance_verdict,
)
from benchmarks.quality.plots import mean_ranks
from benchmarks.quality.runs import Results, Setting, differences
from benchmarks.quality.statistics import Estimate, estimate

INTRODUCTION = """\
<!-- Written by `python -m benchmarks.quality report`; write into results_notes.md instead. -->

The claims of the paper on DR-LoRA (arXiv 2601.04823), measured on the models named below. All
figures and verdicts are computed from the results files; where people wrote, it says *Note*.

How to read them. A *setting* is a model and a task. Its methods train for the same steps
on the same batches with the same optimizer, to the total rank that the tables show. Each method's
learning rate is the one with the best validation loss on the tuning seeds; test figures are at that
rate. Differences are taken seed by seed; below 0 is better for a loss. Brackets are 95 % bootstrap
intervals; a setting counts once in a mean over settings, and of a model and task that ran under
several trainings the one with most runs counts. *These settings*: the seeds are resampled;
*settings like these*: the settings are. Intervals are not corrected for their number: of twenty
comparisons without any effect, one is expected to leave out 0. Noise is the standard deviation of
the second method of a comparison between seeds; p is of the sign-flip test,
and at least 2^(1 - n) for n seeds.
"""
HEADINGS = (
    "In short",
    "The evidence",
    "Methods by task",
    "At equal learning rates",
    "Is it uniform LoRA?",
    "Which experts get the rank",
    "Options of DR-LoRA",
    "Can the paper's method be beaten?",
    "Held-out tasks",
    "Under other training",
    "Defaults",
    "The runs",
)


def render(
    results: Results, notes: Mapping[str, str] | None = None, relevance: Relevance | None = None
) -> str:
    """Write the report.

    Args:
        results: the runs.
        notes: hand-written text by heading, from ``read_notes``.
        relevance: known relevance of experts.
    """
    made = (
        _in_short(results, relevance),
        _evidence(results),
        _by_task(results),
        _equal_rates(results),
        markdown(tables.agreement(results, "uniform_peft", UNIFORM)),
        _ranks(results, relevance),
        markdown(factors.sensitivity(results)),
        markdown(rivals.rivals(results)),
        _held_out(results),
        _other_training(results),
        markdown(factors.defaults(results)),
        _runs(results),
    )
    parts = ["# Does it work?\n", INTRODUCTION]
    for heading, text in zip(HEADINGS, made, strict=True):
        note = (notes or {}).get(heading)
        parts.append(f"## {heading}\n\n" + (f"*Note.* {note}\n\n" if note else "") + f"{text}\n")
    return "\n".join(parts)


def read_notes(path: Path) -> dict[str, str]:
    """Read the hand-written notes: text below ``## heading``, for the headings of the report.

    Raises:
        ValueError: a heading that the report does not have.
    """
    if not path.is_file():
        return {}
    pieces = re.split(r"^## (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    notes = {
        name.strip(): text.strip() for name, text in zip(pieces[1::2], pieces[2::2], strict=True)
    }
    for name in notes:
        if name not in HEADINGS:
            raise ValueError(f"{path}: no heading {name!r}; the report has {', '.join(HEADINGS)}")
    return notes


def _in_short(results: Results, relevance: Relevance | None) -> str:
    found, verdict = relevance_verdict(correlations(results, DRLORA, relevance))
    follows = (
        f"Final ranks follow the task's relevant experts (claimed by the paper): **{verdict}**; "
        f"Spearman's correlation with the known relevance {interval(found, 2)}."
    )
    return markdown(tables.claims(results)) + "\n\n" + follows


def _evidence(results: Results) -> str:
    rows = tables.evidence(results)
    if not rows:
        return NOT_RUN
    return (
        markdown(rows)
        + _gap_by_setting(results, "DR-LoRA", DRLORA)
        + _gap_by_setting(results, "Early growth", EARLY)
        + "\n\nThe gain beside the entropy of DR-LoRA's routing frequency f at the end of training "
        "(1: all experts alike; mean over layers and seeds):\n\n"
        + markdown(tables.concentration(results))
    )


def _gap_by_setting(results: Results, title: str, method: str) -> str:
    groups = compare(results, method, UNIFORM).groups
    if not groups:
        return ""
    gaps = {results.label(setting): estimate([group]) for setting, group in groups.items()}
    return f"\n\n{title} against uniform, test loss:\n\n{_chart(gaps)}"


def _chart(estimates: Mapping[str, Estimate]) -> str:
    return f"```text\n{pictures.intervals(estimates)}\n```"


def _by_task(results: Results) -> str:
    parts = [
        "Test loss against uniform; bold where the interval leaves out 0.",
        markdown(tables.overview(results, results.primary())),
    ]
    for setting in results.settings():
        parts += [f"### {results.label(setting)}", _about(results, setting)]
        parts.append(markdown(tables.methods(results, setting)))
        if UNIFORM in results.cells[setting]:
            parts.append(_chart(_gaps(results, setting)))
    return "\n\n".join(parts)


def _about(results: Results, setting: Setting) -> str:
    training = setting.training
    start = {
        record.start_loss
        for cell in results.cells[setting].values()
        for record in cell.chosen().values()
    }
    loss = f"; the base model's test loss is {max(start):.3f}" if start else ""
    return (
        f"{training.steps} steps of {training.batch_size * training.accumulation} rows; ranks "
        f"{training.r_init} to {training.r_target} of at most {training.r_max}{loss}."
    )


def _gaps(results: Results, setting: Setting) -> dict[str, Estimate]:
    cells = results.cells[setting]
    found = {
        name: estimate([differences(cells[name], cells[UNIFORM])])
        for name in factors.main_methods(results, [setting])
        if name != UNIFORM and not cells[name].method.upper_bound and cells[name].chosen()
    }
    return dict(sorted(found.items(), key=lambda item: item[1].mean))


def _equal_rates(results: Results) -> str:
    parts = [
        tables.edges(results),
        "Mean difference to uniform in test loss, and seeds won, with one rate for both:",
    ]
    for setting in results.settings():
        if rows := tables.rates(results, setting):
            parts += [f"### {results.label(setting)}, rates", markdown(rows)]
    return "\n\n".join(parts) if len(parts) > 2 else NOT_RUN


def _ranks(results: Results, relevance: Relevance | None) -> str:
    rows = tables.rank_correlations(results, DRLORA, relevance)
    if not rows:
        return NOT_RUN
    parts = [
        "Spearman's correlation of DR-LoRA's final ranks with f and g at the end of training, "
        "their product, and the relevance that is known by construction; mean over the layers.",
        markdown(rows),
    ]
    for setting, cells in results.cells.items():
        known = relevance(setting.model, setting.task) if relevance else None
        if known is not None and DRLORA in cells and cells[DRLORA].chosen():
            drawn = pictures.heat_map(mean_ranks(cells[DRLORA]), known)
            parts += [f"{results.label(setting)}, mean final rank:", f"```text\n{drawn}\n```"]
    if relevance and (by_method := tables.relevance_by_method(results, relevance)):
        parts += ["Correlation of final ranks with the known relevance:", markdown(by_method)]
    return "\n\n".join(parts)


def _held_out(results: Results) -> str:
    rows, tau = rivals.orders(results)
    if not rows:
        return NOT_RUN
    return (
        "The order of the methods by their mean test loss against uniform, on tasks and seeds "
        "that no decision was taken on, beside the order in development: Kendall's tau "
        f"{tau:+.2f} (1: the same order, 0: none in common).\n\n{markdown(rows)}"
    )


def _other_training(results: Results) -> str:
    several, changed = tables.other_trainings(results), tables.same_change(results)
    parts = [markdown(several)] if several else []
    if changed:
        parts += ["Against uniform LoRA with the same change:", markdown(changed)]
    return "\n\n".join(parts) or NOT_RUN


def _runs(results: Results) -> str:
    records = results.records
    if not records:
        return NOT_RUN
    hours = sum(record.seconds for record in records) / 3600
    versions: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            versions.setdefault(name, set()).add(version)
    listed = "\n".join(f"- {n}: {', '.join(sorted(v))}" for n, v in sorted(versions.items()))
    median = np.median([record.seconds for record in records])
    return f"""\
{len(records)} runs, {hours:.2f} hours if done one by one, {median:.0f} s the median;
{sum(record.diverged for record in records)} diverged,
{sum(record.refused is not None for record in records)} refused. {_budgets(results)}

{_refusals(results)}{listed}

```bash
python -m benchmarks.quality run main    # or another profile: does the runs that are missing
python -m benchmarks.quality report      # writes this page
```"""


def _refusals(results: Results) -> str:
    """Why methods could not run, each reason once."""
    reasons = {(r.spec.method.name, r.refused) for r in results.records if r.refused is not None}
    lines = [f"- {name} cannot run: {reason}" for name, reason in sorted(reasons)]
    return "\n".join([*lines, "", ""]) if lines else ""


def _budgets(results: Results) -> str:
    bounds = wrong = 0
    for cells in results.cells.values():
        for cell in cells.values():
            for record in (r for by_seed in cell.runs.values() for r in by_seed.values()):
                bounds += cell.method.upper_bound
                fine = cell.method.upper_bound or record.refused or record.diverged
                wrong += not fine and record.total_rank != record.budget
    text = (
        f"{wrong} ended at another total rank than the budget"
        if wrong
        else ("Every finished run ended at exactly the budget")
    )
    return text + (f", not counting {bounds} of upper bounds." if bounds else ".")
