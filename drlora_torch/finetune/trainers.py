"""The trainers of a run: TRL's, with checkpoints that hold the adapter and not the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl import DPOTrainer, SFTTrainer

from drlora_torch.errors import CheckpointError
from drlora_torch.finetune import optimizer_state, stored_callbacks


class _AdapterFiles(Trainer):
    """Leaves the model's weights to :class:`DRLoRACallback`; mixed into trainers of TRL.

    The callback writes the adapter into each checkpoint and restores it from there. TRL's model
    card would describe a fully fine-tuned model, so none is written.

    For a model that processes hold together, it does what the Trainer refuses to: it checkpoints
    the optimizer, in the files of one process. Rows that several processes have are counted once.
    """

    @property
    def _optimizer_groups(self) -> optimizer_state.Groups:
        """The parameters that train, grouped as the Trainer does in one process."""
        decayed = set(self.get_decay_parameter_names(self.model))
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return [[p for n, p in named if (n in decayed) is decay] for decay in (True, False)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        first = self.args.should_save
        state = optimizer_state.gather(self.optimizer, self._optimizer_groups, keep=first)
        if first:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(None)
            return
        try:
            self._load_state_of(checkpoint)
        except CheckpointError:
            raise
        except Exception as error:  # torch and pickle raise kinds of their own
            raise _damaged(checkpoint, f"its optimizer cannot be read ({error})") from error

    def _load_state_of(self, checkpoint: str) -> None:
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
            if not Path(checkpoint, name).is_file():
                raise _damaged(checkpoint, f"it has no {name}")
        if not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        optimizer_state.scatter(self.optimizer, self._optimizer_groups, state)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:  # torch, pickle and NumPy raise kinds of their own
            raise _damaged(str(checkpoint), f"its random state cannot be read ({error})") from error

    def _load_callback_state(self) -> None:
        own = [*self.callback_handler.callbacks, self.control]
        stored_callbacks.check(self.state.stateful_callbacks, own)
        super()._load_callback_state()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.get_tp_size() > 1:
            self.gather_function = self._gather_once
        return super().evaluation_loop(*args, **kwargs)

    def _gather_once(self, losses: torch.Tensor) -> torch.Tensor:
        """The losses [B] of each process, of neighbors with the same rows once: [B * batches]."""
        every: torch.Tensor = self.accelerator.gather(losses)
        once = every.view(-1, len(losses))[:: self.get_tp_size()].reshape(-1)
        data = self.accelerator.gradient_state
        filled_up = data.end_of_dataloader and data.remainder > 0
        return once[: data.remainder] if filled_up else once

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self.get_tp_size()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None: ...

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None: ...

    def _load_best_model(self) -> None: ...

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(
                f"could not write a checkpoint to {self.args.output_dir}: {error}"
            ) from error


def _damaged(checkpoint: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {checkpoint!r} is damaged: {reason}; delete that folder to go on from the "
        "checkpoint before it"
    )


class SFT(_AdapterFiles, SFTTrainer):
    """Trains a model to write the answers."""


class DPO(_AdapterFiles, DPOTrainer):
    """Trains a model to prefer the chosen answers to the rejected ones."""
