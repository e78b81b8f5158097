"""The two files of an adapter directory of PEFT: safetensors and JSON, written together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
    """Tensors and configuration of an adapter directory.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise CheckpointError(f"no PEFT adapter at {path}: it has no {name}")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(str(path / WEIGHTS_FILE), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"the PEFT adapter at {path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG_FILE} does not hold a configuration")
    return tensors, config
