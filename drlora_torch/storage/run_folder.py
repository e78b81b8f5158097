"""Where a run of ``drlora finetune`` keeps its adapter, at the end and on the way there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from drlora_torch.errors import CheckpointError
from drlora_torch.storage.adapter_file import FILE_NAME

RUN_ADAPTER, RUN_CHECKPOINTS = "adapter", "checkpoints"
TRAINER_STATE = "trainer_state.json"
"""Last file that the Trainer writes into a checkpoint."""


def adapter_in(run: Path) -> Path | None:
    """Return the folder of a run's adapter; None if the path is no run of ``drlora finetune``.

    Raises:
        CheckpointError: the run is not finished; names its last checkpoint and how to go on.
    """
    if (run / FILE_NAME).is_file():
        return None
    if (run / RUN_ADAPTER / FILE_NAME).is_file():
        return run / RUN_ADAPTER
    if not (run / RUN_CHECKPOINTS).is_dir():
        return None
    last = newest_checkpoint(run / RUN_CHECKPOINTS)
    state = "it has no checkpoint yet" if last is None else f"its last checkpoint is {last}"
    raise CheckpointError(
        f"the run in {str(run)!r} is not finished: {state}; finish it with: drlora finetune "
        f"--resume {shlex.quote(str(run))}"
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a Trainer, None if there is none.

    One that a crash has cut short has no adapter, or no readable state of the Trainer.
    """
    complete = {
        step: checkpoint
        for checkpoint in folder.glob("checkpoint-*")
        if (checkpoint / FILE_NAME).is_file() and (step := _step_of(checkpoint)) is not None
    }
    return complete[max(complete)] if complete else None


def _step_of(checkpoint: Path) -> int | None:
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    step = state.get("global_step", 0) if isinstance(state, dict) else None
    return step if isinstance(step, int) else None
