"""Callback for Transformers' Trainer and everything built on it (TRL's SFTTrainer, DPOTrainer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drlora_torch.adapter import Adapter


class DRLoRACallback(TrainerCallback):
    """Logs the ranks beside the loss and writes the adapter into every checkpoint folder.

    Training needs no callback: ``attach`` follows the Trainer's optimizer by itself.

    Example::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[DRLoRACallback(adapter)])
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the total and the largest rank to what the Trainer logs."""
        if logs is not None:
            ranks = self.adapter.ranks().values()
            logs["total_rank"] = int(sum(layer.sum() for layer in ranks))
            logs["max_rank"] = int(max(layer.max() for layer in ranks))
            logs["skipped_steps"] = self.adapter.skipped_steps

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the adapter into the checkpoint that the Trainer has just written."""
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            self.adapter.save_pretrained(folder)
