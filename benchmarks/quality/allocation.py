"""From a method and the training that all methods share to the configuration of its allocation."""

from __future__ import annotations

from pydantic import ValidationError

from benchmarks.quality.errors import StudyError, describe
from benchmarks.quality.records import Method, Training
from drlora_core import AllocatorConfig, timetable

STATIC = {"static_profile", "static_gradient", "hindsight"}
"""Kinds whose ranks are given before training, at one event that precedes it."""


def training_of(method: Method, shared: Training) -> Training:
    """The study's training, with what the method does otherwise."""
    return Training.model_validate({**shared.model_dump(), **method.training})


def allocator_config(method: Method, training: Training, seed: int) -> AllocatorConfig:
    """The allocation of a run.

    The window is that of ``Training``; ``prune`` starts at 2 x r_target, an upper bound has r_max
    everywhere, and an expert that wins every event reaches r_max at the last one.

    Args:
        method: whose ``config`` is taken last.
        training: already with what the method does otherwise, see :func:`training_of`.
        seed: of the rows of A and of policy ``random``.

    Raises:
        StudyError: the steps are too few for the events, or drlora refuses the configuration.
    """
    fields = {
        "r_init": training.r_init,
        "r_target": training.r_max if method.upper_bound else training.r_target,
        "r_max": training.r_max,
        **_window(training),
        "seed": seed,
        **method.config,
    }
    if method.kind in STATIC:
        fields |= {"warmup_steps": 0, "growth_interval": 1, "growth_end": 1}
    elif fields.get("policy") == "prune":
        fields["r_init"] = method.config.get("r_init", 2 * training.r_target)
    elif "max_growth" not in method.config:
        cap = timetable.growth_cap(fields["r_init"], fields["r_max"], training.events)
        fields["max_growth"] = training.max_growth or cap
    try:
        return AllocatorConfig.model_validate(fields)
    except ValidationError as error:
        raise StudyError(f"method {method.name!r}: {describe(error)}") from None


def _window(training: Training) -> dict[str, int]:
    """Steps of the events: exactly ``events``, the last at ``growth_end`` or just before."""
    warmup, last = (round(part * training.steps) for part in (training.warmup, training.growth_end))
    if last - warmup < training.events:
        raise StudyError(
            f"{training.events} growth events do not fit between {training.warmup:.0%} and "
            f"{training.growth_end:.0%} of {training.steps} steps; use more steps or fewer events"
        )
    interval, end = timetable.even_events(warmup, last, training.events)
    return {"warmup_steps": warmup, "growth_interval": interval, "growth_end": end}
