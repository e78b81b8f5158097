"""The folder of a run: recipe, data summary, checkpoints, metrics, adapter and result."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import ValidationError

from drlora_core import atomic
from drlora_core.errors import describe_validation_error
from drlora_core.locks import LOCK
from drlora_core.runs import folder as files
from drlora_torch.errors import RunError
from drlora_torch.finetune.data.summary import FILE as DATA
from drlora_torch.finetune.recipe import Recipe, absolute, read_fields, to_yaml

RECIPE, RESULT, METRICS, RECORDING = files.RECIPE, files.RESULT, files.METRICS, files.RECORDING
ADAPTER, CHECKPOINTS, PEFT = "adapter", "checkpoints", "peft"
MERGED, LOGS = "merged", "logs"
RESUMABLE = ("steps", "eval_every", "save_every", "report_to", "run_name")
"""What may change when a run goes on; and where it runs."""


def create(folder: Path, recipe: Recipe) -> None:
    """Make the folder of a new run and write its recipe."""
    refuse_existing(folder)
    with atomic.new_folder(folder) as new:  # a folder without a recipe could not go on
        write(new, recipe)


def check_there(folder: Path) -> None:
    """Refuse to go on writing to a run that somebody has deleted."""
    if (folder / RECIPE).is_file():
        return
    if (folder / DATA).is_file():
        raise RunError(
            f"{str(folder / RECIPE)!r} was moved or deleted while the run trained; put it back and "
            f"go on with --resume"
        )
    raise RunError(
        f"the folder {str(folder)!r} of this run was deleted while it trained; start it again"
    )


def remove_remains(folder: Path) -> None:
    """Remove what was written to a run after it was deleted: nothing can go on from that.

    A folder with RECIPE or DATA, which are written at the start alone, was not deleted.
    """
    ours = {ADAPTER, CHECKPOINTS, LOGS, METRICS, RECORDING, RESULT, LOCK}
    if not folder.is_dir():
        return
    names = [entry.name for entry in folder.iterdir()]
    if all(name in ours or name.startswith(atomic.PREFIX) for name in names):
        shutil.rmtree(folder, ignore_errors=True)


def write(folder: Path, recipe: Recipe) -> None:
    """Write a recipe to the folder of its run; paths in it become absolute."""
    atomic.write_text(folder / RECIPE, to_yaml(absolute(recipe)))


def extend(folder: Path, recipe: Recipe) -> None:
    """Note what has changed of a run that goes on; with more steps, it is not finished any more."""
    saved = read(folder)
    changes = {name: getattr(recipe, name) for name in RESUMABLE}
    changed = saved.model_copy(update=changes)
    if changed != saved:
        write(folder, changed)
    if changed.steps != saved.steps:
        (folder / RESULT).unlink(missing_ok=True)


def refuse_existing(folder: Path) -> None:
    """Refuse a folder that exists or cannot be made, before anything is loaded."""
    if os.path.lexists(folder):
        raise RunError(
            f"output folder {str(folder)!r} exists; use another --output, or --resume its run"
        )
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise RunError(f"output folder {str(folder)!r}: {str(nearest)!r} is a file")
    if not os.access(nearest, os.W_OK):
        raise RunError(f"output folder {str(folder)!r}: {str(nearest)!r} cannot be written to")


def read(folder: Path) -> Recipe:
    """Read the recipe of the run in a folder."""
    path = folder / RECIPE
    if not path.is_file():
        raise RunError(f"{str(folder)!r} is not the folder of a run: it has no {RECIPE}")
    try:
        return Recipe.model_validate(read_fields(path))
    except ValidationError as error:
        text = describe_validation_error(error)
        raise RunError(f"{str(path)!r} cannot be read: {text}") from error
