"""The trainer of a run: TRL's SFTTrainer with checkpoints that hold the adapter, not the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from drlora_torch.adapter import Adapter
from drlora_torch.errors import CheckpointError
from drlora_torch.finetune import optimizer_state
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.integrations.trainer import DRLoRACallback


class AdapterTrainer(SFTTrainer):
    """SFTTrainer that leaves the model's weights to :class:`DRLoRACallback`.

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
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        optimizer_state.scatter(self.optimizer, self._optimizer_groups, state)
        self.lr_scheduler.load_state_dict(schedule)

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
        save_only_model=adapter.is_sharded,
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
    arguments.save_only_model = False  # AdapterTrainer can save more than the Trainer would
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
