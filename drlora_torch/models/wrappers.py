"""Models that PEFT has wrapped or adapted: its LoRA of other modules stays beside ours.

PEFT is never imported here: a model that it adapted exists only where it has been imported.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel: layers have the same names with and without PEFT."""
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        base: nn.Module = model.get_base_model()
        return base
    return model


def is_adapted_by_peft(model: nn.Module) -> bool:
    """True if PEFT has put layers of its own into a model; it has then frozen all others."""
    layers: Any = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and any(
        isinstance(module, layers.BaseTunerLayer) for module in model.modules()
    )
