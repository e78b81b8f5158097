"""What a diagnostic says, and the numbers from which on it says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Severity = Literal["warning", "note"]


class NotCheckedError(Exception):
    """A check cannot be made on this subject; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One failure signature that was found."""

    name: str
    """Name of the check, as in docs/diagnostics.md."""
    severity: Severity
    message: str
    """What was found, one sentence."""
    evidence: Mapping[str, Any]
    """The numbers behind it: plain numbers, strings, and dicts of numbers by layer."""
    advice: str
    """What to try, one sentence."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.name}]\n  try: {self.advice}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Limits of the checks; all are shares or correlations unless said otherwise."""

    progress: float = 0.5
    """Share of the growth R that must be placed before its distribution is judged."""
    few_experts: float = 0.6
    """Saturation: at most this share of experts got any rank ..."""
    few_factor: float = 1.25
    """... at most this many times the fewest that r_max allows (a factor) ..."""
    full_share: float = 0.8
    """... and at least this share of the growth lies with experts at r_max."""
    even_distance: float = 0.05
    """Total-variation distance of the ranks from even ones, up to which they are called even."""
    reliable_correlation: float = 0.5
    """Least rank correlation of importance between the two windows before the first event."""
    noise_correlation: float = 0.2
    """Rank correlation of a signal between the halves of a run, below which it is noise."""
    flat_variation: float = 0.05
    """Coefficient of variation over experts, below which a signal tells nothing apart."""
    unrelated_correlation: float = 0.1
    """Mean rank correlation of f and g, up to which they are called unrelated."""
    stagnant_events: int = 2
    """Successive last events without growth, although quota was due and budget is left (count)."""
    traffic_loss: float = 0.5
    """Loss of routing weight since the first event, from which on an expert has lost traffic."""
    misplaced_share: float = 0.25
    """Share of the rank above r_target that may lie with experts that lost traffic."""
    monopoly_ratio: float = 2.0
    """Scope ``global``: growth of a layer over its even share, from which on it monopolises."""
    window: int = 3
    """Least number of steps in a window (count)."""
