"""The first steps of newborn rank dimensions under Adam.

A slot that changes owner starts with empty optimizer state. Adam would then move the newborn rows
too far: its bias correction uses the parameter's step count t, which is large, while their moments
are as young as their own count n, so at beta = (0.9, 0.999) the first updates are about 3 to 6
times too big. The updates of newborn rows are rescaled to what Adam would do with t = n. Other
optimizers are left alone.

Shape letters: P rank slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.lora.slots import IntArray

SETTLED = 1e-3  # a correction this close to 1 has ended
OLD = -1  # age of a slot that needs no correction

Ages = Mapping[str, IntArray]
"""Optimizer steps that each slot [P] has lived, by layer; OLD where nothing is corrected."""


def adam_ratio(n: np.ndarray, t: float, betas: tuple[float, float]) -> np.ndarray:
    """Step of an Adam whose count is n over that of one whose count is t, for equal moments.

    (1 - b1^t) / (1 - b1^n) * sqrt((1 - b2^n) / (1 - b2^t)), leaving eps aside.

    Example:
        >>> adam_ratio(np.array([1, 1000]), 1000, (0.9, 0.999)).round(3).tolist()
        [0.398, 1.0]
    """
    first, second = betas
    momentum = (1.0 - first**t) / (1.0 - first**n)
    return np.asarray(momentum * np.sqrt((1.0 - second**n) / (1.0 - second**t)))


class Snapshot(NamedTuple):
    """Newborn rows of one parameter as they were before the optimizer's step."""

    parameter: nn.Parameter
    group: dict[str, Any]
    rows: Tensor  # int64 [newborn]
    values: Tensor  # [newborn, features]
    counts: IntArray  # own step count n of each row in the coming step


@torch.no_grad()
def snapshot(loras: Iterable[ExpertLoRA], ages: Ages, optimizer: Optimizer) -> list[Snapshot]:
    """Keep the newborn rows that an Adam is about to move; empty for other optimizers."""
    if not isinstance(optimizer, Adam):
        return []
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    kept = []
    for lora in loras:
        young = np.flatnonzero(ages[lora.name] != OLD)
        if not young.size:
            continue
        rows = torch.from_numpy(young).to(lora.device)
        counts = ages[lora.name][young] + 1
        for parameter in lora.tensors().values():
            if parameter.grad is not None and parameter in groups:
                values = parameter.index_select(0, rows)
                kept.append(Snapshot(parameter, groups[parameter], rows, values, counts))
    return kept


@torch.no_grad()
def correct(snapshots: Iterable[Snapshot], optimizer: Optimizer) -> float:
    """Shorten the step that the newborn rows have just made.

    Returns:
        Own steps after which rows need no correction any more; 0 if nothing was corrected.
    """
    horizon = 0.0
    for kept in snapshots:
        t = float(optimizer.state[kept.parameter]["step"])
        # An optimizer made after the birth has made fewer steps than the row has lived.
        betas = kept.group["betas"]
        ratio = adam_ratio(np.minimum(kept.counts, t), t, betas)
        factor = torch.from_numpy(ratio).to(kept.values).unsqueeze(-1)
        start = kept.values
        if kept.group.get("decoupled_weight_decay"):  # AdamW shrinks the row, then moves it
            start = start * (1.0 - float(kept.group["lr"]) * kept.group["weight_decay"])
        moved = kept.parameter.index_select(0, kept.rows)
        kept.parameter[kept.rows] = torch.lerp(start, moved, factor)
        settled = [math.log(SETTLED) / math.log(beta) for beta in betas if beta > 0]
        horizon = max([horizon, *settled])
    return horizon


def grow_older(ages: Ages, horizon: float) -> None:
    """Close an optimizer step in which rows were corrected; in place."""
    for slots in ages.values():
        slots[slots != OLD] += 1
        slots[slots > horizon] = OLD
