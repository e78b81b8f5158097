"""Find the files of a run; nothing is loaded."""

from __future__ import annotations

import shlex
from pathlib import Path

from pydantic import ValidationError

from drlora_core.cli.common import check_output
from drlora_torch.errors import RunError
from drlora_torch.finetune import folder
from drlora_torch.finetune.data.summary import FILE as DATA_FILE
from drlora_torch.finetune.data.summary import Summary
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.storage.run_folder import final_adapter, newest_checkpoint


def adapter_of(run: Path) -> Path:
    """Return the folder of a run's adapter; of one that goes on, its last complete checkpoint.

    Raises:
        RunError: it has saved neither.
    """
    source = final_adapter(run) or newest_checkpoint(run / folder.CHECKPOINTS)
    if source is None:
        raise RunError(
            f"the run in {str(run)!r} has saved no adapter yet; go on with it: drlora finetune "
            f"--resume {shlex.quote(str(run))}"
        )
    return source


def home_of(run: Path) -> Path:
    """Return the folder with the recipe: ``RUN`` for ``RUN/uniform``, which --compare has made."""
    path = run.expanduser().resolve()
    beside = (path / folder.ADAPTER).is_dir() or (path / folder.CHECKPOINTS).is_dir()
    own = (path / folder.RECIPE).is_file()
    return path.parent if beside and not own and (path.parent / folder.RECIPE).is_file() else run


def read_options(run: Path) -> FinetuneOptions:
    """Return the options of a run; of static LoRA too, in the folder inside that of its run.

    Raises:
        RunError: the folder is not that of a run.
    """
    return folder.read(home_of(run)).options


def read_summary(run: Path) -> Summary | None:
    """Return what a run was trained on, in figures; None if that is unknown."""
    try:
        return Summary.model_validate_json((home_of(run) / DATA_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def trained_columns(run: Path) -> str:
    """Return the first column that a run read, such as ``messages``; nothing if that is unknown."""
    summary = read_summary(run)
    return "" if summary is None else summary.format.partition(",")[0]


def target_of(run: Path, output: Path | None, name: str) -> Path:
    """Return the folder that a command writes to, once it is clear that it can.

    Args:
        run: folder of the run.
        output: as the user has it.
        name: in the folder of the run, if the user does not say.

    Raises:
        DRLoRAError: there is no run or no adapter, or the target cannot be written.
    """
    read_options(run)
    adapter_of(run)
    target = output or run / name
    check_output(target, folder=True)
    return target
