"""One file holds a saved adapter: safetensors, with a JSON description in its header.

It is written atomically, and nothing is ever unpickled.
"""

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

FILE_NAME = "drlora_adapter.safetensors"
KEY = "drlora"


def write(folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    target = folder / FILE_NAME
    metadata = {KEY: json.dumps(description)}
    try:
        atomic.write_file(target, lambda part: save_file(dict(tensors), part, metadata=metadata))
    except (OSError, SafetensorError) as error:
        message = f"could not write {target}: {error}; what was there before is untouched"
        raise CheckpointError(message) from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the description from a folder or file."""
    source = path / FILE_NAME if path.is_dir() else path
    if not source.is_file():
        raise CheckpointError(f"no adapter at {path}: expected a directory with {FILE_NAME}")
    try:
        with safe_open(str(source), framework="pt") as file:
            description = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged or truncated: {error}") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{source} is not a drlora adapter: it has no description of one")
    return tensors, description


def read_description(path: Path) -> dict[str, Any]:
    """Read the description alone, from the header of the file; nothing if it is damaged."""
    try:
        with safe_open(str(path / FILE_NAME), framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
