"""The trainer of a run: TRL's SFTTrainer, whose checkpoints hold the adapter and not the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from drlora_core.recording import RecordingWriter
from drlora_torch.adapter import Adapter
from drlora_torch.errors import CheckpointError
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.integrations.trainer import DRLoRACallback


class AdapterTrainer(SFTTrainer):
    """SFTTrainer that writes and reads adapter checkpoints in place of whole models."""

    adapter: Adapter
    recorder: RecordingWriter

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter alone; the base model has not changed."""
        if self.args.should_save:
            self.recorder.flush()  # a resumed run continues the recording from here
            self.adapter.save_pretrained(output_dir or self.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card into checkpoints: TRL's would describe a whole fine-tuned model."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.adapter.restore(resume_from_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(
                f"could not write a checkpoint to {self.args.output_dir}: {error}"
            ) from error


def build_trainer(
    options: FinetuneOptions,
    adapter: Adapter,
    tokenizer: Any,
    rows: tuple[Any, Any],
    folder: Path,
    callbacks: list[TrainerCallback],
) -> AdapterTrainer:
    """Make the trainer of a run.

    Args:
        options: the run's options.
        adapter: the attached adapter, whose model is trained.
        tokenizer: the model's tokenizer.
        rows: training and held-out rows.
        folder: where checkpoints go.
        callbacks: told of progress, besides our own.
    """
    save_every = options.save_every or max(options.steps // 4, 1)
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(options.steps // 20, 1),
        max_length=options.max_length,
        seed=options.seed,
        bf16=options.dtype == "bfloat16" and torch.cuda.is_available(),
        gradient_checkpointing=options.gradient_checkpointing,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        # With a frozen router the balancing loss could only bend the hidden states.
        router_aux_loss_coef=0.0 if options.router == "frozen" else None,
    )
    train, held_out = rows
    trainer = AdapterTrainer(
        model=adapter.model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[DRLoRACallback(adapter), *callbacks],
    )
    trainer.adapter = adapter
    return trainer
