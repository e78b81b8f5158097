"""Diagnostics: known ways in which rank allocation goes wrong, looked for in a run.

``diagnose(engine)`` or ``diagnose(recording)``; docs/diagnostics.md describes every finding.
"""

from drlora_core.diagnostics.diagnose import CHECKS, Diagnosis, diagnose
from drlora_core.diagnostics.finding import Finding, Thresholds

__all__ = ["CHECKS", "Diagnosis", "Finding", "Thresholds", "diagnose"]
