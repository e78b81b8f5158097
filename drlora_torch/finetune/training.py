"""The trainer of a run: TRL's SFTTrainer with checkpoints that hold the adapter, not the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from drlora_core.recording import RecordingWriter
from drlora_torch.adapter import Adapter
from drlora_torch.errors import CheckpointError
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.integrations.trainer import DRLoRACallback


class AdapterTrainer(SFTTrainer):
    """SFTTrainer that leaves the model's weights to :class:`DRLoRACallback`.

    The callback writes the adapter into each checkpoint and restores it from there.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Make the folder of a checkpoint, without the base model, which has not changed."""
        Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: TRL's would describe a fully fine-tuned model."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load no weights here."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(
                f"could not write a checkpoint to {self.args.output_dir}: {error}"
            ) from error


class FlushRecording(TrainerCallback):
    """Writes the recording to disk with each checkpoint, so that a resumed run can continue it.

    It must come before :class:`DRLoRACallback`, whose file makes a checkpoint complete.
    """

    def __init__(self, recorder: RecordingWriter) -> None:
        self._recorder = recorder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the steps that are still in memory."""
        self._recorder.flush()


def build_trainer(
    options: FinetuneOptions,
    adapter: Adapter,
    tokenizer: Any,
    rows: tuple[Any, Any],
    folder: Path,
    recorder: RecordingWriter,
    callbacks: list[TrainerCallback],
) -> AdapterTrainer:
    """Make the trainer of a run.

    Args:
        options: the run's options.
        adapter: the attached adapter, whose model is trained.
        tokenizer: the model's tokenizer.
        rows: training and held-out rows, ``datasets.Dataset`` each.
        folder: where checkpoints go.
        recorder: the recording that the adapter's engine writes.
        callbacks: called after ours, so that their logs hold the ranks.
    """
    train, held_out = rows
    trainer = AdapterTrainer(
        model=adapter.model,
        args=_arguments(options, folder),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[FlushRecording(recorder), DRLoRACallback(adapter), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: AdapterTrainer, adapter: Adapter, checkpoint: str | None) -> None:
    """Train to the last step, from a checkpoint if there is one.

    A checkpoint of the last step is only restored: the Trainer would make one more step from it.
    """
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step >= trainer.args.max_steps:
            adapter.restore(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def _arguments(options: FinetuneOptions, folder: Path) -> SFTConfig:
    return SFTConfig(
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
        save_steps=options.save_every or max(options.steps // 4, 1),
        save_total_limit=2,
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        # A balancing loss cannot train a frozen router; it would only distort the hidden states.
        router_aux_loss_coef=0.0 if options.router == "frozen" else None,
    )
