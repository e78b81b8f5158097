"""Diagnostics: checks of an engine or a recording for known problems of rank allocation.

docs/diagnostics.md describes every finding.
"""

from drlora_core.diagnostics.checks import CHECKS
from drlora_core.diagnostics.diagnose import Diagnosis, diagnose
from drlora_core.diagnostics.subject import Finding, Thresholds

__all__ = ["CHECKS", "Diagnosis", "Finding", "Thresholds", "diagnose"]
