"""The allocator configuration of a method, from its options and the training settings."""

from __future__ import annotations

from pydantic import ValidationError

from benchmarks.quality.errors import StudyError, describe
from benchmarks.quality.records import Method, Training
from drlora_core import AllocatorConfig, timetable

STATIC = {"static_profile", "static_gradient"}
"""Kinds whose ranks are chosen before training, by a single event."""


def training_of(method: Method, shared: Training) -> Training:
    """The training settings of the study with the changes of the method."""
    return Training.model_validate({**shared.model_dump(), **method.training})


def allocator_config(method: Method, training: Training, seed: int) -> AllocatorConfig:
    """The allocator configuration of a run.

    ``prune`` starts at 2 x r_target. An upper bound has r_max everywhere. By default, max_growth is
    such that an expert that gets rank at every event reaches r_max at the last one.

    Args:
        method: its ``config`` overrides everything else.
        training: from :func:`training_of`.
        seed: of the rows of A and of policy ``random``.

    Raises:
        StudyError: too few steps for the events, or an invalid configuration.
    """
    fields = {
        "r_init": training.r_init,
        "r_target": training.r_max if method.upper_bound else training.r_target,
        "r_max": training.r_max,
        **_window(training),
        "seed": seed,
        **method.config,
    }
    if method.base_kind in STATIC:
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
    """Steps of exactly ``events`` events, the last at or just before ``growth_end``."""
    warmup, last = (round(part * training.steps) for part in (training.warmup, training.growth_end))
    if last - warmup < training.events:
        raise StudyError(
            f"{training.events} growth events do not fit between {training.warmup:.0%} and "
            f"{training.growth_end:.0%} of {training.steps} steps; use more steps or fewer events"
        )
    interval, end = timetable.even_events(warmup, last, training.events)
    return {"warmup_steps": warmup, "growth_interval": interval, "growth_end": end}
