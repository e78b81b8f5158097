"""Callback for Transformers' Trainer and its subclasses, such as TRL's SFTTrainer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from drlora_torch.adapter import Adapter, state_of
from drlora_torch.errors import CheckpointError
from drlora_torch.integrations import checks
from drlora_torch.integrations.metrics import rank_metrics
from drlora_torch.lifecycle.residents import active_tracker
from drlora_torch.storage import trainer_state
from drlora_torch.storage.adapter_file import FILE_NAME
from drlora_torch.storage.entering import save_beside
from drlora_torch.storage.run_folder import newest_checkpoint
from drlora_torch.storage.seal import broken_by, seal

HINT = "resume from last_checkpoint(output_dir), or use DRLoRACallback(adapter, resume_from=...)"


class DRLoRACallback(TrainerCallback):
    """Checkpoints an adapter and logs its ranks with the Trainer's own files and losses.

    Training itself needs no callback: ``attach`` follows the Trainer's optimizer. The callback

    - writes the adapter into every checkpoint folder and restores it on
      ``trainer.train(resume_from_checkpoint=...)``, so that losses and ranks are those of a run
      without the stop;
    - writes the adapter to ``output_dir`` at the end of training (unless ``save_strategy="no"``);
      with ``load_best_model_at_end`` it is that of the best checkpoint;
    - logs the metrics of :func:`~drlora_torch.integrations.metrics.rank_metrics` with each training
      loss, and after each growth event; :class:`~drlora_torch.integrations.rank_images.RankImages`
      sends pictures.

    The metrics reach ``state.log_history``, the progress bar, and every callback that the Trainer
    calls later. It calls the reporters of ``report_to`` (TensorBoard, Weights & Biases, ...) before
    the callbacks of the user; :func:`move_reporters_last` changes that.

    Args:
        adapter: the adapter of the Trainer's model.
        resume_from: the checkpoint folder, if it is not ``checkpoint-*`` in ``output_dir``.

    Raises:
        AttachError: at the start of training, if another adapter is the active one, or the
            Trainer's optimizer does not hold this one.
        CheckpointError: if the checkpoint to resume from cannot be found or holds no adapter.

    Example::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[DRLoRACallback(adapter)])
        move_reporters_last(trainer)  # so that they log the ranks too
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    """

    def __init__(
        self, adapter: Adapter, *, resume_from: str | os.PathLike[str] | None = None
    ) -> None:
        self.adapter = adapter
        self.resume_from = None if resume_from is None else Path(resume_from)
        self._events = len(adapter.events)
        adapter.parameters()  # PEFT's get_peft_model may have frozen them

    def on_init_end(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        # With peft_config= the Trainer has frozen the adapter, and saves the PeftModel.
        checks.unfreeze(self.adapter)
        if model is not None:
            save_beside(self.adapter.model, model)

    def on_train_begin(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        active_tracker(state_of(self.adapter))
        checks.check_optimizer(self.adapter, optimizer)
        checks.check_losses(self.adapter, args, model)
        if state.global_step:
            self.adapter.restore(self._checkpoint(args, state))
        self._events = len(self.adapter.events)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if len(self.adapter.events) > self._events:
            control.should_log = True

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self._events = len(self.adapter.events)
        added = rank_metrics(self.adapter)
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero or self.adapter.is_sharded:
            self.adapter.save_pretrained(_folder(args, state))
        if state.is_world_process_zero:
            seal(_folder(args, state))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.adapter.restore(state.best_model_checkpoint)
        saves = state.is_world_process_zero or self.adapter.is_sharded
        if args.save_strategy != "no" and saves:
            self.adapter.save_pretrained(str(args.output_dir))

    def _checkpoint(self, args: Any, state: TrainerState) -> Path:
        """Find the folder that the Trainer resumes from; callbacks are told only its step."""
        folder = self.resume_from or _folder(args, state)
        if not (folder / FILE_NAME).is_file():
            raise CheckpointError(f"{folder} holds no adapter; {HINT}")
        if (reason := broken_by(folder)) is not None:
            raise CheckpointError(f"{folder} is damaged: {reason}; {HINT}")
        written = _read_state(folder)
        if written is None or _position(written) != _position(state):
            raise CheckpointError(f"the Trainer uses another checkpoint than {folder}; {HINT}")
        return folder


def move_reporters_last(trainer: Trainer) -> None:
    """Let the reporters of ``report_to`` run after all other callbacks, so that they log the ranks.

    Call it before ``trainer.train()``. Reporters that are passed as ``callbacks`` need no such
    call if they come after :class:`DRLoRACallback` in the list.
    """
    for kind in get_reporting_integration_callbacks(trainer.args.report_to):
        reporter = trainer.pop_callback(kind)
        if reporter is not None:
            trainer.add_callback(reporter)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint of a Trainer, None if there is none.

    Unlike ``resume_from_checkpoint=True`` it skips a checkpoint that a crash has cut short, one
    without an adapter or without a readable Trainer state, and, with a warning, one whose files are
    no longer those that were written.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = newest_checkpoint(Path(output_dir))
    return None if found is None else str(found)


def _folder(args: Any, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _position(state: TrainerState) -> str:
    return json.dumps([state.global_step, state.log_history])  # as text, where NaN equals NaN


def _read_state(checkpoint: Path) -> TrainerState | None:
    """Read the last file that the Trainer writes; None if it is missing or damaged."""
    try:
        if trainer_state.read(checkpoint) is None:
            return None
        return TrainerState.load_from_json(str(checkpoint / trainer_state.FILE))
    except (CheckpointError, TypeError):  # TypeError: a field that this Transformers does not know
        return None
