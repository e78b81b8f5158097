"""Callback for Transformers' Trainer and its subclasses, such as TRL's SFTTrainer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks

from drlora_torch.adapter import Adapter, state_of
from drlora_torch.errors import CheckpointError
from drlora_torch.integrations.metrics import rank_metrics, top_experts
from drlora_torch.lifecycle.residents import active_tracker
from drlora_torch.storage.adapter_file import FILE_NAME

STATE_FILE = "trainer_state.json"  # the last file that the Trainer writes


class DRLoRACallback(TrainerCallback):
    """Checkpoints an adapter and logs its ranks with the Trainer's own files and losses.

    Training itself needs no callback: ``attach`` follows the Trainer's optimizer. The callback

    - writes the adapter into every checkpoint folder and restores it on
      ``trainer.train(resume_from_checkpoint=...)``, so that losses and ranks are those of a run
      without the stop;
    - writes the adapter to ``output_dir`` at the end of training (unless ``save_strategy="no"``);
      with ``load_best_model_at_end`` it is that of the best checkpoint;
    - logs the metrics of :func:`~drlora_torch.integrations.metrics.rank_metrics` with each training
      loss, and the top expert of each layer after each growth event.

    The metrics reach ``state.log_history``, the progress bar, and every callback that the Trainer
    calls later. It calls the reporters of ``report_to`` (TensorBoard, Weights & Biases, ...) before
    the callbacks of the user; :func:`move_reporters_last` changes that.

    Args:
        adapter: the adapter of the Trainer's model.
        resume_from: the checkpoint folder, if it is not ``checkpoint-*`` in ``output_dir``.

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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the adapter from the checkpoint that the Trainer resumes from.

        Raises:
            AttachError: the adapter is not the active one, so another would be trained.
            CheckpointError: the checkpoint of the Trainer cannot be found, or holds no adapter.
        """
        active_tracker(state_of(self.adapter))
        if state.global_step:
            self.adapter.restore(self._checkpoint(args, state))
        self._events = len(self.adapter.events)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the Trainer log after a growth event."""
        if len(self.adapter.events) > self._events:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the ranks to the log of a training step."""
        if not logs or "loss" not in logs:
            return
        added: dict[str, float] = rank_metrics(self.adapter)
        if len(self.adapter.events) > self._events:
            self._events = len(self.adapter.events)
            added |= top_experts(self.adapter)
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the adapter into the checkpoint that the Trainer has just written."""
        if state.is_world_process_zero:
            self.adapter.save_pretrained(_folder(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the final adapter; with ``load_best_model_at_end``, restore and write the best."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.adapter.restore(state.best_model_checkpoint)
        saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
        if saves and state.is_world_process_zero:
            self.adapter.save_pretrained(str(args.output_dir))

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Find the folder that the Trainer resumes from; callbacks are told only its step."""
        folder = self.resume_from or _folder(args, state)
        if not (folder / FILE_NAME).is_file():
            raise CheckpointError(
                f"the Trainer resumed at step {state.global_step}, but {folder} holds no adapter; "
                "if writing it was interrupted, resume from last_checkpoint(output_dir); if the "
                "checkpoint is elsewhere, use DRLoRACallback(adapter, resume_from=...)"
            )
        try:
            written = json.loads((folder / STATE_FILE).read_text())
            same = written["global_step"], written["log_history"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / STATE_FILE} cannot be read: {error}") from error
        if json.dumps(same) != json.dumps((state.global_step, state.log_history)):
            raise CheckpointError(
                f"the Trainer resumed from another checkpoint than {folder}; name it: "
                "DRLoRACallback(adapter, resume_from=...)"
            )
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

    Unlike ``resume_from_checkpoint=True`` it skips a checkpoint that a crash has cut short: one
    without an adapter or without a readable Trainer state.
    """
    found = [
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if folder.name.rpartition("-")[2].isdecimal()
    ]
    for _, folder in sorted(found, reverse=True):
        if (folder / FILE_NAME).is_file() and _readable(folder / STATE_FILE):
            return str(folder)
    return None


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
