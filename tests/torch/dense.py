"""What tests of the LoRA of dense Linears share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import drlora_torch
from drlora_torch.adapter import state_of
from tests.torch import helpers, models

RANK = 4


def linears(adapter: drlora_torch.Adapter) -> dict[str, Any]:
    return state_of(adapter).dense


@torch.no_grad()
def fill(adapter: drlora_torch.Adapter, seed: int = 0) -> drlora_torch.Adapter:
    """Draw B of the experts and of the Linears, so that both matter."""
    helpers.fill(adapter, seed)
    generator = torch.Generator().manual_seed(seed)
    for each in linears(adapter).values():
        drawn = torch.randn(each.lora.lora_B.shape, generator=generator)
        each.lora.lora_B.copy_(0.1 * drawn)
    return adapter


def adapted(family: str = "olmoe", **options: Any) -> tuple[Any, drlora_torch.Adapter]:
    model = models.build(family)
    return model, fill(helpers.attach(model, **{"attention_rank": RANK, **options}))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model.eval()(models.tokens()).logits
    return out


def train(model: Any, adapter: drlora_torch.Adapter, seeds: range) -> list[float]:
    optimizer = helpers.adamw(adapter)
    return [helpers.step(model.train(), optimizer, seed) for seed in seeds]
