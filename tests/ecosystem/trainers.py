"""Real Trainer runs on a tiny model, and the plain loop that they must equal."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from transformers import Trainer, TrainingArguments

import drlora_torch
from drlora_torch.integrations.trainer import DRLoRACallback
from tests.torch import helpers, models

STEPS, ROWS, RATE = 8, 2, 1e-2


def rows(count: int = 64, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of one length with padding of their own."""
    generator = torch.Generator().manual_seed(seed)
    ids = models.tokens(count, 7, seed)
    lengths = torch.randint(3, 8, (count,), generator=generator)
    mask = (torch.arange(7) < lengths.unsqueeze(1)).long()
    labels = torch.where(mask.bool(), ids, -100)
    return [
        {"input_ids": ids[i] * mask[i], "attention_mask": mask[i], "labels": labels[i]}
        for i in range(count)
    ]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**values, **renamed(changes)})


def renamed(changes: dict[str, Any]) -> dict[str, Any]:
    """Gradient checkpointing by the name that this Transformers has for it."""
    today = {field.name for field in dataclasses.fields(TrainingArguments)}
    newer = {key: key.replace("gradient_checkp", "activation_checkp") for key in changes}
    return {newer[key] if newer[key] in today else key: value for key, value in changes.items()}


def build(
    folder: Path,
    *,
    attach: dict[str, Any] | None = None,
    kind: type[Trainer] = Trainer,
    **changes: Any,
) -> tuple[Any, drlora_torch.Adapter]:
    """A Trainer as a user would make it."""
    model = models.build()
    adapter = helpers.attach(model, **(attach or {}))
    trainer = kind(
        model,
        arguments(folder, **changes),
        train_dataset=rows(),
        eval_dataset=rows(6, seed=9),
        callbacks=[DRLoRACallback(adapter)],
    )
    return trainer, adapter


def plain_loop(
    *,
    accumulation: int = 1,
    clip: float = 0.0,
    steps: int = STEPS,
    scaler: GradScaler | None = None,
    overflowing: Container[int] = (),
) -> tuple[drlora_torch.Adapter, helpers.Spy]:
    """The same run by hand, in the order of the rows; the loss of some micro-batches overflows."""
    scaler = scaler or GradScaler("cpu", enabled=False)
    numbers = itertools.count()
    model = models.build()
    adapter = helpers.attach(model)
    spy = helpers.Spy(adapter)
    optimizer = helpers.adamw(adapter, RATE, weight_decay=0.1)
    data = rows()
    for step in range(steps):
        start = step * accumulation * ROWS
        batches = [
            {key: torch.stack([row[key] for row in data[at : at + ROWS]]) for key in data[0]}
            for at in range(start, start + accumulation * ROWS, ROWS)
        ]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            loss = model(**batch, num_items_in_batch=items).loss
            scaler.scale(loss * torch.inf if next(numbers) in overflowing else loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return adapter, spy
