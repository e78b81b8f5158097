"""Largest sizes that are accepted, whoever gives them, each with its reason.

They are far above what any training needs. A stranger's file with a larger one is refused before
memory is allocated for it.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import AfterValidator

from drlora_core.errors import shorten

Number = TypeVar("Number", int, float, int | None, float | None)

LARGEST_RANK = 100_000
LARGEST_STEP = 10**12
MOST_EVENTS = 1_000_000
"""Growth events of a run, which are listed in memory."""
MOST_EXPERTS = 2**20
"""Experts of a layer; models have hundreds."""
MOST_DIMENSIONS = 2**27
"""Rank dimensions of all experts whose importance is stored: 1 GiB."""


def at_most(limit: float, reason: str) -> AfterValidator:
    """Return a validator for a field of a model that refuses numbers above a limit."""

    def check(value: Number) -> Number:
        if value is not None and value > limit:
            raise ValueError(f"must be at most {limit:,.15g}, got {shorten(value)}: {reason}")
        return value

    return AfterValidator(check)


RANK_BOUND = at_most(LARGEST_RANK, "no matrix of an expert has such a rank")
STEP_BOUND = at_most(LARGEST_STEP, "no training has so many steps, nor places so many ranks")
GAMMA_BOUND = at_most(50.0, "(r + 1)^gamma must be a finite number at the largest rank")
ALPHA_BOUND = at_most(1e6, "the scale of LoRA, alpha / r_target, is about 2")
SEED_BOUND = at_most(2**128 - 1, "NumPy draws from seeds of 128 bits")
