"""The trainer of a run: TRL's SFTTrainer with checkpoints that hold the adapter, not the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from drlora_torch.adapter import Adapter
from drlora_torch.errors import CheckpointError
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.integrations.trainer import DRLoRACallback


class AdapterTrainer(SFTTrainer):
    """SFTTrainer that leaves the model's weights to :class:`DRLoRACallback`.

    The callback writes the adapter into each checkpoint and restores it from there. TRL's model
    card would describe a fully fine-tuned model, so none is written.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None: ...

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None: ...

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(
                f"could not write a checkpoint to {self.args.output_dir}: {error}"
            ) from error


def _balance_coefficient(options: FinetuneOptions, config: PreTrainedConfig) -> float | None:
    """Weight of the routers' balancing loss; None for a model that has no such loss.

    TRL 1.10 does not read it from the model's config, so it is always passed. The loss cannot
    train a frozen router; it would only distort the hidden states.
    """
    text_config = config.get_text_config()
    if options.router == "frozen":
        return 0.0
    if not hasattr(text_config, "output_router_logits"):
        return None
    return getattr(text_config, "router_aux_loss_coef", 0.0)


def build_trainer(
    options: FinetuneOptions,
    adapter: Adapter,
    tokenizer: Any,
    rows: tuple[Any, Any],
    folder: Path,
    callbacks: list[TrainerCallback],
) -> AdapterTrainer:
    """Make the trainer of a run; its checkpoints go to ``folder``.

    The callbacks come after :class:`DRLoRACallback`, so that their logs hold the ranks.
    """
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
        use_cpu=not torch.cuda.is_available(),
        bf16=options.dtype == "bfloat16" and torch.cuda.is_available(),
        gradient_checkpointing=options.gradient_checkpointing,
        save_steps=options.save_every or max(options.steps // 4, 1),
        save_total_limit=2,
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        router_aux_loss_coef=_balance_coefficient(options, adapter.model.config),
    )
    trainer = AdapterTrainer(
        model=adapter.model,
        args=arguments,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=tokenizer,
        callbacks=[DRLoRACallback(adapter), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluate_first(trainer: AdapterTrainer) -> float:
    """Return the held-out loss before training, in nats per token.

    The Trainer marks the model as prepared for it, without ``DistributedDataParallel``, and would
    leave it so when it trains; the mark is taken back.
    """
    loss = float(trainer.evaluate()["eval_loss"])
    model: Any = trainer.model
    model.__dict__.pop("_is_accelerate_prepared", None)
    trainer.accelerator.free_memory()
    return loss


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
