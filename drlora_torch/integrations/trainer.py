"""Callback for Transformers' Trainer and everything built on it (TRL's SFTTrainer, DPOTrainer)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from drlora_torch.adapter import Adapter, state_of
from drlora_torch.errors import CheckpointError
from drlora_torch.integrations.figures import rank_metrics, top_experts
from drlora_torch.lifecycle.residents import active_tracker
from drlora_torch.storage.adapter_file import FILE_NAME

STATE_FILE = "trainer_state.json"  # the Trainer writes it last


class DRLoRACallback(TrainerCallback):
    """Checkpoints and logs an adapter beside the Trainer's own files and losses.

    Training itself needs no callback: ``attach`` follows the Trainer's optimizer. With it,

    - every checkpoint folder holds the adapter, and ``trainer.train(resume_from_checkpoint=...)``
      brings the adapter back, so that losses and ranks are those of a run without the stop;
    - the end of training writes the adapter to ``output_dir`` (unless ``save_strategy="no"``),
      that of the best checkpoint with ``load_best_model_at_end``;
    - total and largest rank and skipped updates are logged beside the loss, and after each growth
      event the entropy of the ranks and the top expert of every layer.

    Args:
        adapter: the adapter of the Trainer's model.
        resume_from: the checkpoint folder, where it is not ``checkpoint-*`` in ``output_dir``.

    Example::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[DRLoRACallback(adapter)])
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    """

    def __init__(
        self, adapter: Adapter, *, resume_from: str | os.PathLike[str] | None = None
    ) -> None:
        self.adapter = adapter
        self.resume_from = None if resume_from is None else Path(resume_from)
        self._events = len(adapter.events)
        adapter.parameters()  # require gradients again if get_peft_model came after attach

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the adapter to the checkpoint that the Trainer has resumed from.

        Raises:
            AttachError: another adapter of the model is active, so that one would be trained.
        """
        active_tracker(state_of(self.adapter))
        self._go_first()
        if state.global_step:
            self.adapter.restore(self._resumed(args, state))
        self._events = len(self.adapter.events)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the Trainer log after a growth event."""
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
        """Add the ranks to what the Trainer logs of training."""
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
        """Write the final adapter, or bring back and write the best."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.adapter.restore(state.best_model_checkpoint)
        saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
        if saves and state.is_world_process_zero:
            self.adapter.save_pretrained(str(args.output_dir))

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Find the folder that the Trainer resumed from; it tells callbacks only the step."""
        folder = self.resume_from or _folder(args, state)
        if not (folder / FILE_NAME).is_file():
            raise CheckpointError(
                f"the Trainer resumed at step {state.global_step}, but {folder} holds no adapter; "
                "if it was cut off while it was written, resume from last_checkpoint(output_dir); "
                "if the checkpoint is elsewhere, DRLoRACallback(adapter, resume_from=...)"
            )
        try:
            written = json.loads((folder / STATE_FILE).read_text())
            same = written["global_step"], written["log_history"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / STATE_FILE} cannot be read: {error}") from error
        if json.dumps(same) != json.dumps((state.global_step, state.log_history)):
            raise CheckpointError(
                f"the Trainer resumed from another checkpoint than {folder}; say which: "
                "DRLoRACallback(adapter, resume_from=...)"
            )
        return folder

    def _go_first(self) -> None:
        """Come before TensorBoard, wandb and the like, so that they log the ranks too.

        The Trainer puts its own callbacks before the user's and gives no access to the list other
        than through the frame that is calling us. Where that fails, ``state.log_history`` and the
        progress bar have the ranks all the same.
        """
        caller = sys._getframe(2).f_locals.get("self")
        if isinstance(caller, CallbackHandler) and self in caller.callbacks:
            caller.callbacks.remove(self)
            caller.callbacks.insert(0, self)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Newest checkpoint of a Trainer that is complete, adapter included; None without any.

    Unlike ``resume_from_checkpoint=True`` it passes over one that was cut off by a crash.
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
