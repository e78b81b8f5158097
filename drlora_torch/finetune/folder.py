"""The folder of a run: options, checkpoints, metrics, adapter and result."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from drlora_core import atomic
from drlora_torch.errors import RunError
from drlora_torch.finetune.options import FinetuneOptions

OPTIONS, RESULT, METRICS = "options.json", "result.json", "metrics.jsonl"
ADAPTER, CHECKPOINTS, RECORDING = "adapter", "checkpoints", "recording"


class SavedRun(BaseModel):
    """Content of ``options.json``: what a run needs to be continued."""

    options: FinetuneOptions
    compare: Literal["uniform"] | None = None


def default_folder() -> Path:
    """Return a new folder, named by the current time."""
    return Path("runs") / time.strftime("finetune-%Y%m%d-%H%M%S")


def create(folder: Path, run: SavedRun) -> None:
    """Make the folder of a new run and write its options.

    Raises:
        RunError: the folder exists or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=False)
        write_json(folder / OPTIONS, run.model_dump())
    except FileExistsError:
        raise RunError(
            f"output folder {str(folder)!r} exists; use another --output, or --resume "
            f"{str(folder)!r} to continue the run in it"
        ) from None
    except OSError as error:
        raise RunError(f"output folder {str(folder)!r} cannot be made: {error}") from error


def read(folder: Path) -> SavedRun:
    """Read the options of the run in a folder.

    Raises:
        RunError: the folder has no options, or they cannot be read.
    """
    path = folder / OPTIONS
    if not path.is_file():
        raise RunError(f"{str(folder)!r} is not the folder of a run: it has no {OPTIONS}")
    try:
        return SavedRun.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError(f"{str(path)!r} cannot be read: {error}") from error


def read_unfinished(folder: Path) -> SavedRun:
    """Read the options of a run that is to be continued.

    Raises:
        RunError: as :func:`read`, or the run is finished.
    """
    saved = read(folder)
    if (folder / RESULT).is_file():
        raise RunError(f"the run in {str(folder)!r} is finished; see its {RESULT}")
    return saved


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    atomic.write_text(path, json.dumps(value, indent=2) + "\n")


def write_metrics(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the log of a training, one JSON object per line."""
    atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
