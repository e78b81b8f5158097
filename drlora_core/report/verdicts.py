"""What was checked of a run, in plain words: problems, what is good, what could not be checked."""

from __future__ import annotations

import dataclasses

from drlora_core.diagnostics import Finding, diagnose
from drlora_core.replay import first_difference, replay
from drlora_core.runs import Run


@dataclasses.dataclass(frozen=True, slots=True)
class Verdicts:
    """Results of all checks."""

    findings: tuple[Finding, ...]
    good: tuple[str, ...]
    not_checked: tuple[tuple[str, str], ...]
    """Name of the check, and the reason."""


def check(run: Run) -> Verdicts:
    """Check the budget, the loss, the recording, and all that `diagnose` looks for."""
    found = [_check_budget(run), _check_loss(run), _check_skipped(run), _check_replay(run)]
    problems = [each for each in found if isinstance(each, Finding)]
    good = [each for each in found if isinstance(each, str)]
    missing: list[tuple[str, str]] = []
    if run.recording.steps:
        result = diagnose(run)
        problems += result.findings
        good += result.passed.values()
        missing += result.not_checked.items()
    return Verdicts(tuple(problems), tuple(good), tuple(missing))


def _check_budget(run: Run) -> Finding | str | None:
    total, budget = int(run.final.sum()), run.budget
    if total == budget:
        return f"The budget is met exactly: {total:,} rank units."
    ahead = run.config.num_events - len(run.events)
    if not run.config.ranks_change or (ahead and run.outcome is None):
        return None  # ranks of the user's own, or a run that goes on
    evidence, has = {"placed": total, "budget": budget}, f"{total:,} of {budget:,} rank units"
    if run.kept < len(run.events):
        text = f"the saved adapter is that of an earlier step, with {has}"
        advice = "more patience before the training stops, or ranks that are settled earlier"
        return Finding(text, advice, evidence, "note", "budget")
    if ahead:
        text = f"the run ended before {ahead} of its {run.config.num_events} events, with {has}"
        return Finding(text, "a growth_end within the run", evidence, name="budget")
    text = f"{budget - total:,} of {budget:,} rank units of the budget were never placed"
    advice = "look at quota, max_growth and r_max, which limit what an event can place"
    return Finding(text, advice, evidence, name="budget")


def _check_loss(run: Run) -> Finding | str | None:
    outcome = run.outcome
    if outcome is None:
        return None
    if outcome.loss_after < outcome.loss_before:
        return "The held-out loss fell."
    return Finding(
        f"the held-out loss did not fall: {outcome.loss_before:.4f} before, "
        f"{outcome.loss_after:.4f} after",
        "a smaller learning rate, fewer steps, or held-out data that resembles the training data",
        {"before": outcome.loss_before, "after": outcome.loss_after},
        name="loss",
    )


def _check_skipped(run: Run) -> Finding | str | None:
    outcome = run.outcome
    if outcome is None or outcome.skipped_steps is None:
        return None
    if not outcome.skipped_steps:
        return "Every step had finite statistics: none was skipped."
    return Finding(
        f"{outcome.skipped_steps} steps had statistics that were not finite, and were skipped",
        "a smaller learning rate, or bfloat16 in the place of float16",
        {"steps": outcome.skipped_steps},
        name="skipped_steps",
    )


def _check_replay(run: Run) -> Finding | str | None:
    """Replay the recorded decisions, which must come out the same, bit for bit."""
    recording = run.recording
    if run.replayed or not recording.events or recording.policy not in (run.config.policy, None):
        return None
    result = replay(recording)
    if (difference := first_difference(recording.events, result.events)) is None:
        return "A replay of the recording repeats the run's decisions exactly."
    return Finding(
        f"a replay of the recording differs from the run: {difference} (recorded, replayed)",
        "the recording was changed, or is of another version of drlora",
        {"difference": difference},
        name="replay",
    )
