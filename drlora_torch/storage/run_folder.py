"""Where a run of ``drlora finetune`` keeps its adapter, at the end and on the way there."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path

from drlora_torch.errors import CheckpointError
from drlora_torch.storage import trainer_state
from drlora_torch.storage.adapter_file import FILE_NAME, read_description
from drlora_torch.storage.seal import broken_by

RUN_ADAPTER, RUN_CHECKPOINTS = "adapter", "checkpoints"
RUN_RECIPE, RUN_RESULT = "run.yaml", "result.json"


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
    does not fit its seal, or whose state holds what no Trainer writes, is passed over, with a
    warning.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    complete: dict[int, Path] = {}
    reason = None
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        if not (checkpoint / FILE_NAME).is_file():
            continue
        try:
            state = trainer_state.read(checkpoint)
        except CheckpointError as error:
            reason = str(error)
            _warn(checkpoint, reason)
            continue
        if state is not None:
            complete[state.global_step] = checkpoint
    for step in sorted(complete, reverse=True):
        if (broken := broken_by(complete[step])) is None:
            return complete[step]
        reason = broken
        _warn(complete[step], reason)
    if reason is not None:
        raise CheckpointError(
            f"every checkpoint in {str(folder)!r} is damaged ({reason}); delete that folder to "
            "start from the beginning"
        )
    return None


def _warn(checkpoint: Path, reason: str) -> None:
    text = f"{checkpoint} is damaged and is passed over for an older one: {reason}"
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def _steps_in(folder: Path) -> int:
    """Optimizer steps that an adapter has seen; 0 if its file is damaged."""
    engine = read_description(folder).get("engine")
    steps = engine.get("step") if isinstance(engine, dict) else None
    return steps if isinstance(steps, int) else 0
