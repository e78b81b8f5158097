"""Where a run of ``drlora finetune`` keeps its adapter, at the end and on the way there."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path

from drlora_torch.errors import CheckpointError
from drlora_torch.storage.adapter_file import FILE_NAME, read_description
from drlora_torch.storage.seal import broken_by

RUN_ADAPTER, RUN_CHECKPOINTS = "adapter", "checkpoints"
RUN_RECIPE, RUN_RESULT = "run.yaml", "result.json"
TRAINER_STATE = "trainer_state.json"
"""Last file that the Trainer writes into a checkpoint."""


def adapter_in(run: Path) -> Path | None:
    """Return the folder of a run's adapter; None if the path is no run of ``drlora finetune``.

    Raises:
        CheckpointError: the run is not finished; names its last checkpoint and how to go on.
    """
    if (run / FILE_NAME).is_file():
        return None
    if (final := final_adapter(run)) is not None:
        return final
    if not (run / RUN_CHECKPOINTS).is_dir():
        return None
    last = newest_checkpoint(run / RUN_CHECKPOINTS)
    state = "it has no checkpoint yet" if last is None else f"its last checkpoint is {last}"
    raise CheckpointError(
        f"the run in {str(run)!r} is not finished: {state}; finish it with: drlora finetune "
        f"--resume {shlex.quote(str(run))}"
    )


def final_adapter(run: Path) -> Path | None:
    """Return the folder of the adapter that a run ended with; None if it has not ended.

    A finished run that goes on with more steps keeps its old adapter until it ends again: a
    checkpoint of a later step is newer. (A finished run may have one too: it keeps the best.)
    """
    final = run / RUN_ADAPTER
    if not (final / FILE_NAME).is_file():
        return None
    # The static LoRA of a comparison has its recipe and result in the folder around its own.
    home = run if (run / RUN_RECIPE).is_file() else run.resolve().parent
    if (home / RUN_RESULT).is_file():
        return final
    last = newest_checkpoint(run / RUN_CHECKPOINTS)
    return final if last is None or _steps_in(last) <= _steps_in(final) else None


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a Trainer, None if there is none.

    One that a crash has cut short has no adapter, or no readable state of the Trainer. One that
    does not fit its seal is passed over, with a warning.

    Raises:
        CheckpointError: there are checkpoints, and none fits its seal.
    """
    complete = {
        step: checkpoint
        for checkpoint in folder.glob("checkpoint-*")
        if (checkpoint / FILE_NAME).is_file() and (step := _step_of(checkpoint)) is not None
    }
    reason = None
    for step in sorted(complete, reverse=True):
        if (reason := broken_by(complete[step])) is None:
            return complete[step]
        text = f"{complete[step]} is damaged and is passed over for an older one: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    if reason is not None:
        raise CheckpointError(
            f"every checkpoint in {str(folder)!r} is damaged ({reason}); delete that folder to "
            "start from the beginning"
        )
    return None


def _step_of(checkpoint: Path) -> int | None:
    try:
        state = json.loads((checkpoint / TRAINER_STATE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    step = state.get("global_step", 0) if isinstance(state, dict) else None
    return step if isinstance(step, int) else None


def _steps_in(folder: Path) -> int:
    """Optimizer steps that an adapter has seen; 0 if its file is damaged."""
    engine = read_description(folder).get("engine")
    steps = engine.get("step") if isinstance(engine, dict) else None
    return steps if isinstance(steps, int) else 0
