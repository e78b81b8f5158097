"""Lightning: a resumed fit is one that never stopped; growth is logged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from pytorch_lightning.loggers.logger import Logger

import drlora_torch
from drlora_torch.integrations.lightning import DRLoRALightningCallback
from drlora_torch.integrations.metrics import rank_metrics
from tests.torch import helpers, models

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own

FILE = "drlora_adapter.safetensors"
BATCHES, ACCUMULATION = 14, 2


class Loader:
    """Batches in order; it says where it is, so that Lightning can go on in the middle."""

    def __init__(self, length: int) -> None:
        self.length, self.next = length, 0

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.next, self.length):
            self.next = number + 1
            yield helpers.batch(number)
        self.next = 0

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Module(lightning.LightningModule):
    """Saves itself after every batch."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.model = models.build()
        self.adapter = helpers.attach(self.model, router="after_warmup")
        self.losses: list[float] = []

    def training_step(self, batch: Any, number: int) -> Any:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        self.model(**batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.save_checkpoint(self.folder / f"{len(self.losses)}.ckpt")

    def configure_optimizers(self) -> Any:
        return helpers.adamw(self.adapter, weight_decay=0.1)


class Log(Logger):
    """Stands where TensorBoard's logger would."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name, version = "log", "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def fit(folder: Path, checkpoint: Path | None = None, callback: bool = True) -> tuple[Module, Log]:
    """A run as a user would write it, with clipping, accumulation and validation."""
    module, log = Module(folder), Log()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=0.5,
        val_check_interval=4,
        logger=log,
        log_every_n_steps=1,
        callbacks=[DRLoRALightningCallback(module.adapter, folder)] if callback else [],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Loader(BATCHES), Loader(1), ckpt_path=checkpoint, weights_only=True)
    return module, log


def plain_loop() -> tuple[list[float], drlora_torch.Adapter]:
    model = models.build()
    adapter = helpers.attach(model, router="after_warmup")
    optimizer = helpers.adamw(adapter, weight_decay=0.1)
    losses = []
    for number in range(BATCHES):
        loss = model(**helpers.batch(number)).loss
        (loss / ACCUMULATION).backward()
        losses.append(loss.item())
        if (number + 1) % ACCUMULATION == 0:
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return losses, adapter


def test_a_resumed_fit_is_one_that_never_stopped(tmp_path: Path) -> None:
    """Stopped between steps and in the middle of one; both equal a plain loop."""
    straight, log = fit(tmp_path / "straight")
    losses, plain = plain_loop()
    assert straight.losses == losses
    assert helpers.rank_history(straight.adapter) == helpers.rank_history(plain)
    assert [event.step for event in straight.adapter.events] == [4, 6]
    whole = (tmp_path / "straight" / FILE).read_bytes()
    for stop in (5, 8, 11):
        resumed, rest = fit(tmp_path / str(stop), tmp_path / "straight" / f"{stop}.ckpt")
        assert resumed.losses == losses[stop:]
        assert (tmp_path / str(stop) / FILE).read_bytes() == whole
        assert rest.rows == [row for row in log.rows if row[0] > stop // ACCUMULATION]


def test_growth_is_logged(tmp_path: Path) -> None:
    module, log = fit(tmp_path)
    assert [step for step, _ in log.rows] == [4, 6]
    assert log.rows[1][1] == rank_metrics(module.adapter)
    assert log.rows[0][1]["total_rank"] < log.rows[1][1]["total_rank"] == 2 * 8 * 4


def test_a_checkpoint_without_an_adapter_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "bare", callback=False)
    with pytest.raises(drlora_torch.CheckpointError, match="holds no adapter"):
        fit(tmp_path / "resumed", tmp_path / "bare" / "5.ckpt")
