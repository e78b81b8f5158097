"""Newborn rows under schedule-free optimizers: averaged and corrected for bias from their birth on.

The optimizer moves z, averages it into x with the weight c = w_t / (w_1 + ... + w_t), and trains at
y = (1 - beta) z + beta x, which the parameter holds (arXiv 2405.15682). At a late step t, c is
about 1 / t, as if a newborn row had been at rest for t steps: it would hardly follow its z. And z
would move up to 30 times too far, as the second moment is young. So the step of newborn rows is
made again with c and the bias correction of their own count n. A warmup is not repeated.

This never ends: c depends on the count as 1 / n, so for a row that was born at step b, c differs
by b / n from that of the group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from drlora_torch.step.optimizers.adam import rectification
from drlora_torch.step.optimizers.correction import (
    Correction,
    Count,
    Snapshot,
    as_column,
    local_state,
    write_rows,
)
from drlora_torch.step.optimizers.names import is_a


def averaging_weight(
    n: Tensor, most: int, power: float, rectified: tuple[float, float] | None = None
) -> Tensor:
    """c_n = w_n / (w_1 + ... + w_n) with w_j = j^power, for counts ``n`` from 1.

    Args:
        n: counts, float64.
        most: no count is larger: the host need not look for the largest.
        power: ``r`` of the parameter group.
        rectified: for RAdam, its second beta and ``weight_lr_power``: w_j then has the factor
            (largest rectification up to j)^weight_lr_power.

    Example:
        >>> averaging_weight(torch.tensor([1.0, 2.0, 4.0]), 4, 0.0).tolist()
        [1.0, 0.5, 0.25]
    """
    size = 1 << (most - 1).bit_length()
    return _averaging_weights(size, power, rectified, n.device)[n.long() - 1]


@functools.lru_cache(maxsize=8)
def _averaging_weights(
    size: int, power: float, rectified: tuple[float, float] | None, device: torch.device
) -> Tensor:
    """c_1 ... c_size. Sizes are powers of 2, so a row of any age costs O(1) a step on average."""
    steps = torch.arange(1, size + 1, dtype=torch.float64, device=device)
    weights = steps**power
    if rectified is not None:
        second, exponent = rectified
        weights = weights * rectification(steps, second, 4.0).cummax(0).values ** exponent
    sums = weights.cumsum(0)
    return weights / torch.where(sums > 0, sums, 1.0)


def _after(
    optimizer: Optimizer,
    snapshots: Sequence[Snapshot],
    counts: Sequence[Count],
    skipped: Tensor | None,
) -> float:
    for kept, count in zip(snapshots, counts, strict=True):
        if "z" in kept.state:
            # the count of a group is a number, and so nothing waits
            _move(optimizer, kept, int(count), skipped)
    return math.inf


def _move(optimizer: Optimizer, kept: Snapshot, t: int, skipped: Tensor | None) -> None:
    """Make the step of the rows again, but of those that are as old as the optimizer."""
    if t < 1:
        return
    z_now = local_state(optimizer, kept.parameter)["z"]
    y, z, beta = kept.values, kept.state["z"], _momentum(kept.group)
    n = kept.counts.clamp(max=float(t))
    lr = kept.group.get("scheduled_lr", kept.group["lr"])
    own_lr, bias = _speeds(optimizer, kept.group, n, t)
    decay = lr * kept.group["weight_decay"] * y
    z_before, y_before = z_now.index_select(0, kept.rows), kept.weights.index_select(0, kept.rows)
    move = (z - z_before - decay) * as_column(own_lr * bias, y)
    move += decay * as_column(own_lr, y)
    c = averaging_weight(n, t, kept.group["r"], _rectified(optimizer, kept.group))
    column = as_column(c, y)
    young = (kept.counts < t).unsqueeze(-1)
    moved = y.lerp(z, column) + move * (beta * (1.0 - column) - 1.0)
    write_rows(kept, torch.where(young, moved, y_before), skipped)
    state = kept._replace(weights=z_now)
    write_rows(state, torch.where(young, z - move, z_before), skipped)


def _momentum(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def _rectified(optimizer: Optimizer, group: dict[str, Any]) -> tuple[float, float] | None:
    if not is_a(optimizer, "schedulefree.RAdamScheduleFree"):
        return None
    return float(group["betas"][1]), float(group["weight_lr_power"])


def _speed(optimizer: Optimizer, group: dict[str, Any], n: Tensor) -> Tensor:
    """Learning rate at count n over that of the group.

    RAdam rests until it can rectify; newborn rows do so without ``silent_sgd_phase`` too.
    """
    rectified = _rectified(optimizer, group)
    return torch.ones_like(n) if rectified is None else rectification(n, rectified[0], 4.0)


def _speeds(
    optimizer: Optimizer, group: dict[str, Any], n: Tensor, t: int
) -> tuple[Tensor, Tensor]:
    """Factors of the learning rate, and of the gradient that the second moment divides."""
    now = float(_speed(optimizer, group, torch.tensor([t], dtype=torch.float64)))
    own_lr = _speed(optimizer, group, n) / (now or 1.0)
    if "betas" not in group:
        return own_lr, torch.ones_like(n)
    second = group["betas"][1]
    return own_lr, torch.sqrt((1.0 - second**n) / (1.0 - second**t))


SCHEDULE_FREE = Correction(after=_after, keep=("z",))
