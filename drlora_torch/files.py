"""One file holds a saved adapter: safetensors, with a JSON description in its header.

The file is written beside its final name, flushed to disk and renamed, so at every moment there is
the old adapter or the new one, whole. Nothing is ever unpickled. Folders that others fill, such as
Transformers' checkpoints, are written beside their place too (:func:`folder_written_whole`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drlora_torch.errors import CheckpointError

FILE_NAME = "drlora_adapter.safetensors"
KEY = "drlora"


def write(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Path:
    """Write an adapter file into the directory ``path``, replacing an older one at once.

    Raises:
        CheckpointError: the disk is full or may not be written; what was there is untouched.
    """
    target = path / FILE_NAME
    temporary = path / f".drlora-{uuid.uuid4().hex}.part"
    try:
        path.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's umask; safetensors would make it private
        save_file(dict(tensors), temporary, metadata={KEY: json.dumps(description)})
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, target)
        _sync(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {target}: {error}; what was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter from a directory or file.

    Raises:
        CheckpointError: it is missing, truncated, or not a file of ours.
    """
    source = path / FILE_NAME if path.is_dir() else path
    if not source.is_file():
        raise CheckpointError(f"no adapter at {path}: expected a directory with {FILE_NAME}")
    try:
        with safe_open(str(source), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise CheckpointError(f"{source} is a safetensors file, but not a drlora adapter")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description = json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source} is damaged or truncated: {error}") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{source} has no readable description")
    return tensors, description


@contextlib.contextmanager
def folder_written_whole(path: Path, replaces: str) -> Iterator[Path]:
    """Give an empty folder to write to; afterwards its files take their place in ``path``.

    Older files there that match the pattern ``replaces`` go (a checkpoint may have had more
    shards). If the writing fails, ``path`` is as it was.
    """
    part = path.parent / f".drlora-{uuid.uuid4().hex}.part"
    try:
        part.mkdir(parents=True)
        yield part
        path.mkdir(exist_ok=True)
        written = sorted(part.iterdir())
        for older in set(path.glob(replaces)) - {path / file.name for file in written}:
            older.unlink()
        for file in written:
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
