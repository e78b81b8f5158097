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
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from drlora_torch.step.optimizers.adam import rectification
from drlora_torch.step.optimizers.correction import (
    Correction,
    Snapshot,
    as_column,
    local_state,
)
from drlora_torch.step.optimizers.names import is_a

Array = np.ndarray[Any, Any]


def averaging_weight(n: Array, power: float, rectified: tuple[float, float] | None = None) -> Array:
    """c_n = w_n / (w_1 + ... + w_n) with w_j = j^power, for counts ``n`` from 1.

    Args:
        n: counts, int64.
        power: ``r`` of the parameter group.
        rectified: for RAdam, its second beta and ``weight_lr_power``: w_j then has the factor
            (largest rectification up to j)^weight_lr_power.

    Example:
        >>> averaging_weight(np.array([1, 2, 4]), 0.0).tolist()
        [1.0, 0.5, 0.25]
    """
    size = 1 << int(n.max() - 1).bit_length()
    return np.asarray(_averaging_weights(size, power, rectified)[n - 1])


@functools.lru_cache(maxsize=8)
def _averaging_weights(size: int, power: float, rectified: tuple[float, float] | None) -> Array:
    """c_1 ... c_size. Sizes are powers of 2, so a row of any age costs O(1) a step on average."""
    steps = np.arange(1, size + 1)
    weights = steps.astype(np.float64) ** power
    if rectified is not None:
        second, exponent = rectified
        weights *= np.maximum.accumulate(rectification(steps, second, 4.0)) ** exponent
    sums = np.cumsum(weights)
    return np.asarray(weights / np.where(sums > 0, sums, 1.0))


def _after(optimizer: Optimizer, kept: Snapshot, count: float | None) -> float:
    t = count or 0.0
    state = local_state(optimizer, kept.parameter)
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
        c = as_column(averaging_weight(n, kept.group["r"], _rectified(optimizer, kept.group)), y)
        kept.weights[rows] = y.lerp(z, c) + move * (beta * (1.0 - c) - 1.0)
        state["z"][rows] = z - move
    return math.inf


def _momentum(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def _rectified(optimizer: Optimizer, group: dict[str, Any]) -> tuple[float, float] | None:
    if not is_a(optimizer, "schedulefree.RAdamScheduleFree"):
        return None
    return float(group["betas"][1]), float(group["weight_lr_power"])


def _speed(optimizer: Optimizer, group: dict[str, Any], n: Array) -> Array:
    """Learning rate at count n over that of the group.

    RAdam rests until it can rectify; newborn rows do so without ``silent_sgd_phase`` too.
    """
    rectified = _rectified(optimizer, group)
    return np.ones(n.shape) if rectified is None else rectification(n, rectified[0], 4.0)


def _speeds(optimizer: Optimizer, group: dict[str, Any], n: Array, t: float) -> tuple[Array, Array]:
    """Factors of the learning rate, and of the gradient that the second moment divides."""
    now = _speed(optimizer, group, np.array([t]))[0]
    own_lr = _speed(optimizer, group, n) / (now or 1.0)
    if "betas" not in group:
        return own_lr, np.ones(n.shape)
    second = group["betas"][1]
    return own_lr, np.sqrt((1.0 - second**n) / (1.0 - second**t))


SCHEDULE_FREE = Correction(after=_after, keep=("z",))
