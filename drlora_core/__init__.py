"""Framework-agnostic rank allocation for LoRA on mixture-of-experts models (never imports torch).

Start with :class:`AllocatorConfig` and :class:`AllocatorEngine`.
"""

from drlora_core.config import AllocatorConfig
from drlora_core.engine import AllocatorEngine
from drlora_core.errors import (
    DRLoRAError,
    LayoutError,
    PolicyError,
    StatisticError,
    StepOrderError,
    UnknownLayerError,
)
from drlora_core.events import GrowthEvent
from drlora_core.policies import AllocationRequest, Policy

__all__ = [
    "AllocationRequest",
    "AllocatorConfig",
    "AllocatorEngine",
    "DRLoRAError",
    "GrowthEvent",
    "LayoutError",
    "Policy",
    "PolicyError",
    "StatisticError",
    "StepOrderError",
    "UnknownLayerError",
]
