"""The folder of a run: options, checkpoints, metrics, adapter and result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from drlora_core import atomic
from drlora_torch.errors import RunError
from drlora_torch.finetune.options import FinetuneOptions

OPTIONS, RESULT, METRICS = "options.json", "result.json", "metrics.jsonl"
ADAPTER, CHECKPOINTS, RECORDING, PEFT = "adapter", "checkpoints", "recording", "peft"


class SavedRun(BaseModel):
    """Content of ``options.json``: what a run needs to be continued."""

    options: FinetuneOptions
    compare: Literal["uniform"] | None = None
    processes: int | None = None
    """Processes that shared the rows of a step when the run began; those of one tensor-parallel
    group have the same rows and count as one."""


def create(folder: Path, run: SavedRun) -> None:
    """Make the folder of a new run and write its options."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise _exists(folder) from None
    atomic.write_text(folder / OPTIONS, run.model_dump_json(indent=2) + "\n")


def refuse_existing(folder: Path) -> None:
    """Refuse what :func:`create` would refuse, before anything is loaded."""
    if folder.exists():
        raise _exists(folder)


def _exists(folder: Path) -> RunError:
    return RunError(
        f"output folder {str(folder)!r} exists; use another --output, or --resume its run"
    )


def read(folder: Path) -> SavedRun:
    """Read the options of the run in a folder."""
    path = folder / OPTIONS
    if not path.is_file():
        raise RunError(f"{str(folder)!r} is not the folder of a run: it has no {OPTIONS}")
    try:
        return SavedRun.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error}") from error


def write_metrics(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the log of a training, one JSON object per line."""
    atomic.write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
