"""An adapter directory of PEFT: safetensors and a JSON configuration, written together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drlora_core import atomic
from drlora_torch.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def write(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write both files; older ones are replaced only once both are complete.

    Raises:
        CheckpointError: the disk is full or may not be written.
    """
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with atomic.replaced_files(path) as folder:
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            atomic.write_file(
                folder / WEIGHTS_FILE,
                lambda part: save_file(held, part, metadata={"format": "pt"}),
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write the export to {path}: {error}") from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the configuration.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"no PEFT adapter at {path}: it has no {name}")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"the PEFT adapter at {path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG_FILE} does not hold a configuration")
    return tensors, config


def scaling_of(config: Mapping[str, Any], target: str) -> float:
    """Scaling of a target: alpha / r, either of which a pattern may change.

    Raises:
        CheckpointError: the configuration gives it no finite scaling.

    Example:
        >>> scaling_of({"r": 4, "lora_alpha": 8}, "mlp.experts.down_proj")
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
    """The value of the first pattern that matches the end of the name, as PEFT does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            return value
    return default
