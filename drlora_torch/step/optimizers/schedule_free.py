"""Newborn rows under schedule-free optimizers: averaged and corrected for bias from their birth on.

The optimizer moves z, averages it into x with the weight c = w_t / (w_1 + ... + w_t), and trains at
y = (1 - beta) z + beta x, which the parameter holds (arXiv 2405.15682). At a late step t, c is
about 1 / t, as if a newborn row had been at rest for t steps: it would hardly follow its z. And z
would move up to 30 times too far, as the second moment is young. So the step of newborn rows is
made again with c and the bias correction of their own count n. A warmup is not repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from drlora_torch.step.optimizers.adam import rectification
from drlora_torch.step.optimizers.correction import (
    SETTLED,
    Correction,
    Snapshot,
    as_column,
    count_steps,
    settled_after,
)
from drlora_torch.step.optimizers.names import is_a

Array = np.ndarray[Any, Any]


def averaging_weight(speeds: Array, n: Array, group: dict[str, Any]) -> Array:
    """c_n = w_n / (w_1 + ... + w_n) with w_j = j^r * (largest lr up to j)^power; ``n`` from 1.

    ``speeds`` are the learning rates of the steps 1, 2 ... of a row, relative to its group's.

    Example:
        >>> group = {"r": 0.0, "weight_lr_power": 2.0}
        >>> averaging_weight(np.ones(4), np.array([1, 2, 4]), group).tolist()
        [1.0, 0.5, 0.25]
    """
    steps = np.arange(1, speeds.size + 1)
    weights = steps ** group["r"] * np.maximum.accumulate(speeds) ** group["weight_lr_power"]
    sums = np.cumsum(weights)
    return np.asarray((weights / np.where(sums > 0, sums, 1.0))[n - 1])


def _after(optimizer: Optimizer, kept: Snapshot) -> float:
    t = count_steps(optimizer, kept.parameter, kept.group) or 0.0
    state = optimizer.state[kept.parameter]
    second = kept.group["betas"][1] if "betas" in kept.group else 0.0
    young = np.flatnonzero(kept.counts < t)  # an optimizer made after the birth is as young
    if young.size and "z" in kept.state:
        n = kept.counts[young]
        pick = torch.from_numpy(young).to(kept.rows.device)
        rows, y, z = kept.rows[pick], kept.values[pick], kept.state["z"][pick]
        beta, lr = _momentum(kept.group), kept.group.get("scheduled_lr", kept.group["lr"])
        own_lr, bias = _speeds(optimizer, kept.group, n, t)
        decay = lr * kept.group["weight_decay"] * y
        move = (z - state["z"][rows] - decay) * as_column(own_lr * bias, y)
        move += decay * as_column(own_lr, y)
        speeds = _speed(optimizer, kept.group, np.arange(1, int(n.max()) + 1))
        c = as_column(averaging_weight(speeds, n, kept.group), y)
        kept.parameter[rows] = y.lerp(z, c) + move * (beta * (1.0 - c) - 1.0)
        state["z"][rows] = z - move
    return max((float(kept.group["r"]) + 1.0) / SETTLED, settled_after(second))


def _momentum(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def _speed(optimizer: Optimizer, group: dict[str, Any], n: Array) -> Array:
    """Learning rate at count n over that of the group.

    RAdam rests until it can rectify; newborn rows do so without ``silent_sgd_phase`` too.
    """
    if is_a(optimizer, "schedulefree.RAdamScheduleFree"):
        return rectification(n, group["betas"][1], 4.0)
    return np.ones(n.shape)


def _speeds(optimizer: Optimizer, group: dict[str, Any], n: Array, t: float) -> tuple[Array, Array]:
    """Factors of the learning rate, and of the gradient that the second moment divides."""
    now = _speed(optimizer, group, np.array([t]))[0]
    own_lr = _speed(optimizer, group, n) / (now or 1.0)
    if "betas" not in group:
        return own_lr, np.ones(n.shape)
    second = group["betas"][1]
    return own_lr, np.sqrt((1.0 - second**n) / (1.0 - second**t))


SCHEDULE_FREE = Correction(after=_after, keep=("z",))
