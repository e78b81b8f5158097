"""The folder of a run: options, checkpoints, metrics, adapter and result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from drlora_torch.errors import RunError
from drlora_torch.finetune.options import FinetuneOptions

OPTIONS, RESULT, METRICS = "options.json", "result.json", "metrics.jsonl"
ADAPTER, CHECKPOINTS, RECORDING = "adapter", "checkpoints", "recording"


def default_folder() -> Path:
    """Return a folder that does not exist yet, named by the time."""
    return Path("runs") / time.strftime("finetune-%Y%m%d-%H%M%S")


def create(folder: Path, options: FinetuneOptions, compare: str | None) -> None:
    """Make the folder of a new run.

    Raises:
        RunError: it exists, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=False)
        write_json(folder / OPTIONS, {"options": options.model_dump(), "compare": compare})
    except FileExistsError:
        raise RunError(
            f"output folder {str(folder)!r} exists; give another --output, or --resume "
            f"{str(folder)!r} to go on with the run in it"
        ) from None
    except OSError as error:
        raise RunError(f"output folder {str(folder)!r} cannot be made: {error}") from error


def read_options(folder: Path) -> tuple[FinetuneOptions, str | None]:
    """Options of the run in a folder, to go on with it.

    Raises:
        RunError: there is no run, it is finished, or its options cannot be read.
    """
    if not (folder / OPTIONS).is_file():
        raise RunError(f"{str(folder)!r} is not the folder of a run: it has no {OPTIONS}")
    if (folder / RESULT).is_file():
        raise RunError(f"the run in {str(folder)!r} is finished; see its {RESULT}")
    try:
        saved = json.loads((folder / OPTIONS).read_text())
        return FinetuneOptions.model_validate(saved["options"]), saved["compare"]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise RunError(f"{str(folder / OPTIONS)!r} cannot be read: {error}") from error


def last_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint that was written to its end, None if there is none.

    The Trainer writes its state last, so a checkpoint without a readable one was cut off.
    """
    found = (folder / CHECKPOINTS).glob("checkpoint-*")
    for checkpoint in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return checkpoint
    return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once: beside its name, then renamed."""
    temporary = path.with_suffix(".part")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_metrics(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write what the Trainer logged, one JSON line each."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
