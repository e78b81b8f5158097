"""Run every check on an engine or a recording."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from drlora_core import runs
from drlora_core.config import AllocatorConfig
from drlora_core.diagnostics import subject as subjects
from drlora_core.diagnostics.checks import CHECKS
from drlora_core.diagnostics.healthy import HEALTHY
from drlora_core.diagnostics.subject import Finding, NotCheckedError, Subject, Thresholds
from drlora_core.engine import AllocatorEngine
from drlora_core.errors import LayoutError
from drlora_core.recording import Recording


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of `diagnose`."""

    findings: tuple[Finding, ...]
    passed: Mapping[str, str]  # checks that found no problem, with what that means
    not_checked: Mapping[str, str]  # checks that could not be made, with the reason

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["nothing found"]
        lines += [f"good: {', '.join(self.passed)}"] if self.passed else []
        lines += [f"not checked: {name} ({why})" for name, why in self.not_checked.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def diagnose(
    subject: AllocatorEngine | Recording | runs.Run,
    config: AllocatorConfig | None = None,
    *,
    thresholds: Thresholds | None = None,
) -> Diagnosis:
    """Look for known problems in a live engine, a recording or a run.

    Args:
        subject: an engine knows only its present; a recording, or a run opened with
            `drlora_core.runs.open_run`, allows every check.
        config: with a recording: diagnose its replay under this configuration (required if the
            recording has none).
        thresholds: limits that replace the default ones.

    Raises:
        LayoutError: there is nothing to diagnose, or no configuration.
        DRLoRAError: SciPy is not installed (extra ``cli``).
    """
    seen, limits = _describe(subject, config), thresholds or Thresholds()
    findings, passed, not_checked = [], {}, {}
    for name, check in CHECKS.items():
        try:
            finding = check(seen, limits)
        except NotCheckedError as reason:
            not_checked[name] = str(reason)
        else:
            if finding is None:
                passed[name] = HEALTHY[name]
            else:
                findings.append(dataclasses.replace(finding, name=name))
    return Diagnosis(tuple(findings), passed, not_checked)


def _describe(subject: object, config: AllocatorConfig | None) -> Subject:
    if isinstance(subject, Recording):
        return subjects.from_run(runs.from_recording(subject, config))
    if not isinstance(subject, (AllocatorEngine, runs.Run)):
        kind = type(subject).__name__
        raise LayoutError(f"diagnose an engine, a Recording or a Run, not a {kind}")
    if config is not None:
        kind = "engine" if isinstance(subject, AllocatorEngine) else "run"
        raise LayoutError(f"this {kind} has its own configuration; config is for recordings")
    if isinstance(subject, runs.Run):
        return subjects.from_run(subject)
    return subjects.from_engine(subject)
