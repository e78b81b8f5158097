"""Make the trainer of a run, and train with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, SFTConfig

from drlora_core.errors import near_misses
from drlora_torch.adapter import Adapter
from drlora_torch.errors import CheckpointError, RunError
from drlora_torch.finetune import stored_callbacks
from drlora_torch.finetune.data.prepare import Prepared
from drlora_torch.finetune.options import FinetuneOptions
from drlora_torch.finetune.trainers import DPO, SFT
from drlora_torch.integrations.rank_images import RankImages
from drlora_torch.integrations.trainer import DRLoRACallback, move_reporters_last
from drlora_torch.integrations.trl import BaseReference
from drlora_torch.storage import trainer_state


def build_trainer(
    options: FinetuneOptions,
    adapter: Adapter,
    tokenizer: Any,
    data: Prepared,
    folder: Path,
    logs: Path,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """Make the trainer of a run; its checkpoints go to ``folder``, TensorBoard's files to ``logs``.

    The callbacks come after :class:`DRLoRACallback`, so that their logs hold the ranks.
    """
    stopping = [EarlyStoppingCallback(options.patience)] if options.patience else []
    given: dict[str, Any] = {
        "model": adapter.model,
        "train_dataset": data.train,
        "eval_dataset": data.held_out,
        "processing_class": tokenizer,
        "callbacks": [DRLoRACallback(adapter), *callbacks, *stopping],
    }
    arguments = _arguments(options, adapter, folder)
    if options.method == "dpo":
        own: dict[str, Any] = {"beta": options.beta, "max_length": options.max_length}
        given["ref_model"] = BaseReference(adapter)
        trainer: Trainer = DPO(args=DPOConfig(**arguments, **own), **given)
    else:
        own = {
            "max_length": options.max_length,
            "packing": options.packing,
            "eval_packing": False,
        }
        trainer = SFT(args=SFTConfig(**arguments, **own), **given)
    trainer.args.save_only_model = False  # the trainer can save more than the Trainer would
    trainer.remove_callback(PrinterCallback)
    move_reporters_last(trainer)
    if options.report_to:
        for reporter in trainer.callback_handler.callbacks:
            if isinstance(reporter, TensorBoardCallback) and reporter.logging_dir is None:
                reporter.logging_dir = str(logs)
        trainer.add_callback(RankImages(adapter, trainer.callback_handler.callbacks))
    return trainer


def _arguments(options: FinetuneOptions, adapter: Adapter, folder: Path) -> dict[str, Any]:
    """What TRL's configurations have in common."""
    gpu = torch.cuda.is_available()
    watched = options.eval_every is not None
    return {
        "output_dir": str(folder),
        "router_aux_loss_coef": _balance_coefficient(options, adapter.model.config),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.lr_scheduler,
        "warmup_steps": options.learning_rate_warmup,
        "weight_decay": options.weight_decay,
        "optim": options.optimizer,
        "max_grad_norm": options.max_grad_norm,
        "seed": options.seed,
        "use_cpu": not gpu,
        "bf16": options.dtype == "bfloat16" and gpu,
        "gradient_checkpointing": options.gradient_checkpointing,
        "eval_strategy": "steps" if watched else "no",
        "eval_steps": options.eval_every,
        "load_best_model_at_end": options.patience is not None,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "save_steps": options.steps_between_checkpoints,
        "save_total_limit": 2,
        "save_only_model": adapter.is_sharded,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it hides a diverged training
        "include_num_input_tokens_seen": "non_padding",
        "report_to": list(options.report_to or ("none",)),
        "run_name": options.run_name or folder.parent.name,
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
    }


def check_reporters(names: Sequence[str] | None) -> None:
    """Refuse reporters that the Trainer does not know or whose library is missing.

    Raises:
        RunError: names what is known, or what to install.
    """
    for name in names or ():
        if name not in INTEGRATION_TO_CALLBACK:
            hint = near_misses(name, INTEGRATION_TO_CALLBACK)
            raise RunError(f"--report-to {name}: the Trainer has no such reporter; {hint}")
        try:
            (kind,) = get_reporting_integration_callbacks([name])
            kind()
        except Exception as error:  # each has an error of its own for a missing library or login
            reason = " ".join(str(error).split())
            raise RunError(f"--report-to {name} cannot be used: {reason}") from error


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


def evaluate_first(trainer: Trainer) -> float:
    """Return the held-out loss before training, in nats per token.

    The Trainer marks the model as prepared for it, without ``DistributedDataParallel``, and would
    leave it so when it trains; the mark is taken back.
    """
    loss = float(trainer.evaluate()["eval_loss"])
    model: Any = trainer.model
    model.__dict__.pop("_is_accelerate_prepared", None)
    trainer.accelerator.free_memory()
    return loss


def read_state(checkpoint: str | None) -> TrainerState | None:
    """Return the state of the Trainer in a checkpoint; None without one.

    Raises:
        CheckpointError: it cannot be read.
    """
    if checkpoint is None:
        return None
    file = Path(checkpoint) / trainer_state.FILE
    if trainer_state.read(file.parent) is None:
        raise CheckpointError(f"{file} is not a Trainer's state: it is missing or cut short")
    try:
        return TrainerState.load_from_json(str(file))
    except TypeError as error:  # a field that this Transformers does not know
        raise CheckpointError(f"{file} is not a Trainer's state: {error}") from error


def train(trainer: Trainer, adapter: Adapter, checkpoint: str | None) -> None:
    """Train to the last step, from a checkpoint if there is one.

    A checkpoint of a training that has ended is only restored, or the best one in its place: the
    Trainer would make one more step from it.
    """
    state = read_state(checkpoint)
    if state is None or checkpoint is None or not _has_ended(state, trainer.args.max_steps):
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    best = Path(checkpoint).parent / f"checkpoint-{state.best_global_step}"
    keeps_best = trainer.args.load_best_model_at_end and best.is_dir()
    adapter.restore(best if keeps_best else checkpoint)
    trainer.state = state


def _has_ended(state: TrainerState, steps: int) -> bool:
    """True at the last step, or where early stopping has run out of patience."""
    if state.global_step >= steps:
        return True
    stored: Any = state.stateful_callbacks
    name = EarlyStoppingCallback.__name__
    stored_callbacks.check(stored, [EarlyStoppingCallback()])
    if not isinstance(stopping := stored.get(name), dict):
        return False
    fields = {**stopping.get("args", {}), **stopping.get("attributes", {})}
    waited, patience = (fields.get(f"early_stopping_patience{part}") for part in ("_counter", ""))
    return waited is not None and patience is not None and waited >= patience
