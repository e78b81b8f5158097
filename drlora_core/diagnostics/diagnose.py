"""Run every check on an engine or a recording."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from drlora_core.config import AllocatorConfig
from drlora_core.diagnostics import allocation, signals
from drlora_core.diagnostics.finding import Finding, NotCheckedError, Thresholds
from drlora_core.diagnostics.subject import Subject, from_engine, from_recording
from drlora_core.engine import AllocatorEngine
from drlora_core.errors import LayoutError
from drlora_core.recording.data import Recording

Check = Callable[[Subject, Thresholds], Finding | None]

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        check.__name__: check
        for check in (
            allocation.saturated_growth,
            allocation.even_growth,
            allocation.stagnant_growth,
            allocation.unplaced_quota,
            allocation.monopolised_budget,
            signals.unreliable_first_event,
            signals.never_routed,
            signals.lost_traffic,
            signals.uninformative_routing,
            signals.uninformative_importance,
            signals.unrelated_signals,
        )
    }
)
"""Every check, by name. A check returns a finding, or None where all is well."""


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of `diagnose`."""

    findings: tuple[Finding, ...]
    not_checked: Mapping[str, str]
    """Checks that could not be made, with the reason."""

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["nothing found"]
        return "\n".join(
            lines + [f"not checked: {n} ({why})" for n, why in self.not_checked.items()]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "not_checked": dict(self.not_checked),
        }


def diagnose(
    subject: AllocatorEngine | Recording,
    config: AllocatorConfig | None = None,
    *,
    thresholds: Thresholds | None = None,
) -> Diagnosis:
    """Look for the known failure signatures in a live engine or a recording.

    Args:
        subject: an engine knows only its present; a recording allows every check.
        config: with a recording: diagnose its replay under this configuration (needed where it
            has none of its own). A replay cannot know how the statistics would have changed
            under other ranks.
        thresholds: other limits.

    Raises:
        LayoutError: nothing to look at, or no configuration.
    """
    if isinstance(subject, AllocatorEngine):
        if config is not None:
            raise LayoutError("an engine has its own configuration; config is for recordings")
        seen = from_engine(subject)
    elif isinstance(subject, Recording):
        seen = from_recording(subject, config)
    else:
        raise LayoutError(f"diagnose an engine or a Recording, not a {type(subject).__name__}")
    findings, not_checked = [], {}
    for name, check in CHECKS.items():
        try:
            finding = check(seen, thresholds or Thresholds())
        except NotCheckedError as reason:
            not_checked[name] = str(reason)
        else:
            findings += [] if finding is None else [finding]
    return Diagnosis(tuple(findings), not_checked)
