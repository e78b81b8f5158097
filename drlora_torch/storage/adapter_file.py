"""One file holds a saved adapter: safetensors, with a JSON description in its header.

It is written atomically, and nothing is ever unpickled. A hash of all that it holds, also in its
header, tells damage from what was saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drlora_core import atomic
from drlora_torch.errors import CheckpointError

FILE_NAME = "drlora_adapter.safetensors"
KEY, CHECKSUM = "drlora", "drlora_sha256"


def write(folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    target = folder / FILE_NAME
    told = json.dumps(description)
    metadata = {KEY: told, CHECKSUM: checksum(tensors, told)}

    def save(part: Path) -> None:
        save_file(dict(tensors), part, metadata=metadata)
        _sort_metadata(part)

    try:
        atomic.write_file(target, save)
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
            metadata = file.metadata() or {}
            description = json.loads(metadata.get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged or truncated: {error}") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{source} is not a drlora adapter: it has no description of one")
    _check(source, tensors, metadata)
    return tensors, description


def _sort_metadata(file: Path) -> None:
    """Make equal content an equal file: safetensors writes its metadata in a random order."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same JSON, which safetensors pads with spaces"
        stream.seek(8)
        stream.write(text.ljust(size))


def checksum(tensors: Mapping[str, Tensor], told: str) -> str:
    """SHA-256 of the description, and of names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(told.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # not a copy
    return digest.hexdigest()


def _check(source: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Refuse a file that holds something else than what was saved."""
    wanted = metadata.get(CHECKSUM)
    older = wanted is None and metadata.keys() <= {KEY, "format"}  # it was saved without one
    if not older and wanted != checksum(tensors, metadata[KEY]):
        raise CheckpointError(
            f"{source} is damaged: its content is not what was saved (its checksum differs); copy "
            "it again from where it came, or go on from an earlier checkpoint"
        )


def read_description(path: Path) -> dict[str, Any]:
    """Read the description alone, from the header of the file; nothing if it is damaged."""
    try:
        with safe_open(str(path / FILE_NAME), framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
