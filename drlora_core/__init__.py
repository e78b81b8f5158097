"""Rank allocation for LoRA on mixture-of-experts models, in NumPy alone.

Start with :class:`AllocatorConfig` and :class:`AllocatorEngine`.
"""

from drlora_core.comparison import compare
from drlora_core.config import AllocatorConfig
from drlora_core.diagnostics import diagnose
from drlora_core.engine import AllocatorEngine
from drlora_core.errors import (
    DRLoRAError,
    LayoutError,
    PolicyError,
    StatisticError,
    StepOrderError,
    TimetableError,
    UnknownLayerError,
)
from drlora_core.events import GrowthEvent
from drlora_core.policies import AllocationRequest, Policy
from drlora_core.recording import Recording
from drlora_core.replay import replay
from drlora_core.sweep import sweep

__all__ = [
    "AllocationRequest",
    "AllocatorConfig",
    "AllocatorEngine",
    "DRLoRAError",
    "GrowthEvent",
    "LayoutError",
    "Policy",
    "PolicyError",
    "Recording",
    "StatisticError",
    "StepOrderError",
    "TimetableError",
    "UnknownLayerError",
    "compare",
    "diagnose",
    "replay",
    "sweep",
]
