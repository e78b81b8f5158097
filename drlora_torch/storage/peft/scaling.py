"""How PEFT scales a target: alpha / r, either of which a pattern may change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from drlora_torch.errors import CheckpointError


def of(config: Mapping[str, Any], target: str) -> float:
    """Scaling of a target under an adapter configuration.

    Example:
        >>> of({"r": 4, "lora_alpha": 8}, "mlp.experts.down_proj")
        2.0
    """
    try:
        rank = float(_by_pattern(config.get("rank_pattern"), target, config["r"]))
        alpha = float(_by_pattern(config.get("alpha_pattern"), target, config["lora_alpha"]))
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise CheckpointError(f"no readable r and lora_alpha for {target!r}: {error}") from error
    if not math.isfinite(scaling):
        raise CheckpointError(f"the scaling of {target!r} is not finite")
    return scaling


def _by_pattern(patterns: Mapping[str, Any] | None, target: str, default: Any) -> Any:
    """The first pattern that matches the end of the name, as PEFT does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            return value
    return default
