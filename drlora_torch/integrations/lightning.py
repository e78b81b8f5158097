"""Callback for the Trainer of ``pytorch_lightning``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn

from drlora_torch.adapter import Adapter, state_of
from drlora_torch.errors import CheckpointError
from drlora_torch.integrations.metrics import rank_metrics
from drlora_torch.lifecycle.residents import active_tracker
from drlora_torch.storage.adapter_file import FILE_NAME

KEY = "drlora_adapter"


class DRLoRALightningCallback(Callback):
    """Checkpoints an adapter and logs its ranks with Lightning's own states and losses.

    Training itself needs no callback: ``attach`` follows the optimizer of the LightningModule. The
    callback

    - puts the adapter into every checkpoint and restores it on
      ``trainer.fit(module, ckpt_path=...)``, so that losses and ranks are those of a run without
      the stop, also between the micro-batches of an accumulation (with ``save_weights_only=True``
      Lightning calls no callback, so the checkpoint holds no adapter);
    - logs the metrics of :func:`~drlora_torch.integrations.metrics.rank_metrics` and the top expert
      of each layer after each growth event, to all loggers;
    - writes the adapter to ``dirpath`` at the end of training.

    Models of ``from_pretrained`` are in evaluation mode, which Lightning keeps: dropout is off
    unless you call ``model.train()``.

    Args:
        adapter: the adapter of the module's model.
        dirpath: the directory for the final adapter.

    Raises:
        AttachError: at the start of training, if another adapter is the active one.
        CheckpointError: if the checkpoint to resume from holds no adapter, or one of another shape.

    Example::

        trainer = Trainer(callbacks=[DRLoRALightningCallback(module.adapter, "adapter")])
        trainer.fit(module, loader, ckpt_path="last")
    """

    def __init__(self, adapter: Adapter, dirpath: str | os.PathLike[str]) -> None:
        self.adapter = adapter
        self.dirpath = Path(dirpath)
        self._events = len(adapter.events)
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        adapter.parameters()  # PEFT's get_peft_model may have frozen them

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        active_tracker(state_of(self.adapter))
        # Set the gradients of an unfinished step again: the first validation has cleared them.
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if len(self.adapter.events) == self._events:
            return
        self._events = len(self.adapter.events)
        metrics = rank_metrics(self.adapter)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.adapter.save_pretrained(folder)
            file = bytearray((Path(folder) / FILE_NAME).read_bytes())
        checkpoint[KEY] = torch.frombuffer(file, dtype=torch.uint8)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        file = checkpoint.get(KEY)
        if not isinstance(file, Tensor):
            raise CheckpointError("the checkpoint holds no adapter: its run had no such callback")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / FILE_NAME).write_bytes(file.cpu().numpy().tobytes())
            self.adapter.restore(folder)
        self._events = len(self.adapter.events)
        parameters = self.adapter.parameters()
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.adapter.save_pretrained(self.dirpath)
