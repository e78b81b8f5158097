"""Expert LoRA with dynamic ranks for the mixture-of-experts models of PyTorch and Transformers.

Start with :func:`attach`. Names are imported on first use, so that the command line starts fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drlora_torch.adapter import Adapter
    from drlora_torch.api import adapters, attach, discover, load, set_adapter
    from drlora_torch.errors import AttachError, CheckpointError, ModelError
    from drlora_torch.models.declaration import register_moe
    from drlora_torch.models.quantization.in_memory import dequantize_experts, quantize_experts
    from drlora_torch.models.quantization.quantizer import Experts4bitConfig
    from drlora_torch.models.quantization.stored_quantizers import packed_config
    from drlora_torch.models.records import MoELayer
    from drlora_torch.profiling import profile
    from drlora_torch.signals import ImportanceSignal, ProjectionRows, RoutingSignal
    from drlora_torch.step.optimizers.meanings import register_optimizer_state

from drlora_torch.models.quantization.registering import register_quantizers

_HOMES = {
    "Adapter": "drlora_torch.adapter",
    "AttachError": "drlora_torch.errors",
    "CheckpointError": "drlora_torch.errors",
    "Experts4bitConfig": "drlora_torch.models.quantization.quantizer",
    "ImportanceSignal": "drlora_torch.signals",
    "ModelError": "drlora_torch.errors",
    "MoELayer": "drlora_torch.models.records",
    "ProjectionRows": "drlora_torch.signals",
    "RoutingSignal": "drlora_torch.signals",
    "adapters": "drlora_torch.api",
    "attach": "drlora_torch.api",
    "dequantize_experts": "drlora_torch.models.quantization.in_memory",
    "discover": "drlora_torch.api",
    "load": "drlora_torch.api",
    "packed_config": "drlora_torch.models.quantization.stored_quantizers",
    "profile": "drlora_torch.profiling",
    "quantize_experts": "drlora_torch.models.quantization.in_memory",
    "register_moe": "drlora_torch.models.declaration",
    "register_optimizer_state": "drlora_torch.step.optimizers.meanings",
    "set_adapter": "drlora_torch.api",
}

__all__ = [
    "Adapter",
    "AttachError",
    "CheckpointError",
    "Experts4bitConfig",
    "ImportanceSignal",
    "MoELayer",
    "ModelError",
    "ProjectionRows",
    "RoutingSignal",
    "adapters",
    "attach",
    "dequantize_experts",
    "discover",
    "load",
    "packed_config",
    "profile",
    "quantize_experts",
    "register_moe",
    "register_optimizer_state",
    "set_adapter",
]


register_quantizers()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
