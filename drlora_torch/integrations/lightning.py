"""Callback for Lightning's Trainer, of ``pytorch_lightning`` and of ``lightning.pytorch``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from drlora_torch.adapter import Adapter, state_of
from drlora_torch.errors import CheckpointError
from drlora_torch.integrations.figures import rank_metrics, top_experts
from drlora_torch.lifecycle.residents import active_tracker
from drlora_torch.storage.adapter_file import FILE_NAME

KEY = "drlora_adapter"


class DRLoRALightningCallback(Callback):
    """Checkpoints and logs an adapter beside Lightning's own states and losses.

    Training itself needs no callback: ``attach`` follows the optimizer of the LightningModule. With
    it,

    - every checkpoint holds the adapter, and ``trainer.fit(module, ckpt_path=...)`` brings it back,
      so that losses and ranks are those of a run without the stop, between the micro-batches of an
      accumulation too (with ``save_weights_only=True`` Lightning asks no callback, so such a
      checkpoint holds no adapter);
    - each growth event logs total and largest rank, entropy of the ranks, skipped updates and the
      top expert of every layer, to all loggers;
    - the end of training writes the adapter to ``dirpath``.

    A LightningModule must be in training mode to be counted; models of ``from_pretrained`` come in
    evaluation mode, which Lightning keeps: call ``model.train()``.

    Args:
        adapter: the adapter of the module's model.
        dirpath: the directory for the final adapter.

    Example::

        trainer = Trainer(callbacks=[DRLoRALightningCallback(module.adapter, "adapter")])
        trainer.fit(module, loader, ckpt_path="last")
    """

    def __init__(self, adapter: Adapter, dirpath: str | os.PathLike[str]) -> None:
        self.adapter = adapter
        self.dirpath = Path(dirpath)
        self._events = len(adapter.events)
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        adapter.parameters()  # require gradients again if get_peft_model came after attach

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the gradients of an unfinished step again, which the first validation has cleared.

        Raises:
            AttachError: another adapter of the model is active, so that one would be trained.
        """
        active_tracker(state_of(self.adapter))
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Log after a growth event."""
        if len(self.adapter.events) == self._events:
            return
        self._events = len(self.adapter.events)
        figures = rank_metrics(self.adapter) | top_experts(self.adapter)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the adapter's file into the checkpoint, as bytes."""
        with tempfile.TemporaryDirectory() as folder:
            self.adapter.save_pretrained(folder)
            file = bytearray((Path(folder) / FILE_NAME).read_bytes())
        checkpoint[KEY] = torch.frombuffer(file, dtype=torch.uint8)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bring the adapter to the checkpoint that Lightning loads."""
        file = checkpoint.get(KEY)
        if not isinstance(file, Tensor):
            raise CheckpointError(
                "the checkpoint holds no adapter; was DRLoRALightningCallback among the callbacks "
                "of the run that wrote it?"
            )
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / FILE_NAME).write_bytes(file.cpu().numpy().tobytes())
            self.adapter.restore(folder)
        self._events = len(self.adapter.events)
        pending = [(parameter, parameter.grad) for parameter in self.adapter.parameters()]
        self._gradients = [(p, gradient) for p, gradient in pending if gradient is not None]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final adapter."""
        if trainer.is_global_zero:
            self.adapter.save_pretrained(self.dirpath)
