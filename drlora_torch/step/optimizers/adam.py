"""Newborn rows under Adam and its kin: the update is rescaled to that of a young bias correction.

With equal moments, the updates of an optimizer whose count is n and of one whose count is t differ
by a factor only, which depends on n, t and the betas. Epsilon is left aside: rows whose gradients
are not much larger than it move less than under a fresh Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from drlora_torch.step.optimizers.codes import is_quantized
from drlora_torch.step.optimizers.correction import (
    Correction,
    Snapshot,
    as_column,
    local_state,
    settled_after,
)
from drlora_torch.step.optimizers.names import algorithm

Factor = Callable[[Optimizer, Snapshot, np.ndarray[Any, Any], float], Tensor]
"""From n of each row and t to the factor of its update, [newborn, 1] or [newborn, features]."""


def adam_ratio(
    n: np.ndarray[Any, Any], t: float, betas: tuple[float, float]
) -> np.ndarray[Any, Any]:
    """Step of an Adam whose count is n over that of one whose count is t, for equal moments.

    (1 - b1^t) / (1 - b1^n) * sqrt((1 - b2^n) / (1 - b2^t)), leaving eps aside.

    Example:
        >>> adam_ratio(np.array([1, 1000]), 1000, (0.9, 0.999)).round(3).tolist()
        [0.398, 1.0]
    """
    first, second = betas
    momentum = (1.0 - first**t) / (1.0 - first**n)
    return np.asarray(momentum * np.sqrt((1.0 - second**n) / (1.0 - second**t)))


def largest_step(n: np.ndarray[Any, Any], betas: tuple[float, float]) -> np.ndarray[Any, Any]:
    """Largest update of an Adam at count n, over its learning rate, whatever the gradients.

    By Cauchy and Schwarz, sqrt(sum a_k^2 / c_k), where a_k and c_k are the weights that the two
    moments give to the gradient k steps ago. Block-wise state can exceed it: the second moments of
    a row are rounded to zero next to much larger ones in their block.

    Example:
        >>> largest_step(np.array([1, 10, 10_000]), (0.9, 0.999)).round(2).tolist()
        [1.0, 1.04, 7.27]
    """
    first, second = betas
    ratio = first**2 / second
    terms = n if ratio == 1.0 else (1.0 - ratio**n) / (1.0 - ratio)
    momentum = (1.0 - first) / (1.0 - first**n)
    return np.asarray(momentum * np.sqrt((1.0 - second**n) / (1.0 - second) * terms))


def rectification(n: np.ndarray[Any, Any], beta: float, least: float) -> np.ndarray[Any, Any]:
    """r of RAdam (arXiv 1908.03265, algorithm 2) at count n; 0 up to the length ``least``."""
    limit = 2.0 / (1.0 - beta) - 1.0
    length = limit - 2.0 * n * beta**n / (1.0 - beta**n)
    long = np.maximum(length, least)
    squared = (long - 4.0) * (long - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * long)
    return np.where(length > least, np.sqrt(squared), 0.0)


def _adam(optimizer: Optimizer, kept: Snapshot, n: np.ndarray[Any, Any], t: float) -> Tensor:
    return as_column(adam_ratio(n, t, kept.group["betas"][:2]), kept.values)


def _adamax(optimizer: Optimizer, kept: Snapshot, n: np.ndarray[Any, Any], t: float) -> Tensor:
    """The infinity norm has no bias."""
    first = kept.group["betas"][0]
    return as_column((1.0 - first**t) / (1.0 - first**n), kept.values)


def _radam(optimizer: Optimizer, kept: Snapshot, n: np.ndarray[Any, Any], t: float) -> Tensor:
    """In its first steps, RAdam does not divide by the second moment."""
    first, second = kept.group["betas"]
    state = local_state(optimizer, kept.parameter)
    denominator = state["exp_avg_sq"].index_select(0, kept.rows).sqrt() + kept.group["eps"]

    def size(count: np.ndarray[Any, Any]) -> Tensor:
        rectified = rectification(count, second, 5.0)
        scale = as_column(rectified * np.sqrt(1.0 - second**count), kept.values)
        return torch.where(scale > 0, scale, denominator) / as_column(1.0 - first**count, scale)

    return size(n) / size(np.full_like(n, t, dtype=np.float64))


def _decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Weight decay that shrinks the row before the update moves it, as AdamW does."""
    decoupled = (
        group.get("decoupled_weight_decay")  # torch
        or getattr(optimizer, "is_adamw", False)  # torchao
        or algorithm(optimizer) == "adam"  # bitsandbytes, under the name Adam too
    )
    return float(group["lr"]) * group["weight_decay"] if decoupled else 0.0


def _rescale(factor: Factor) -> Callable[[Optimizer, Snapshot, float | None], float]:
    def after(optimizer: Optimizer, kept: Snapshot, t: float | None) -> float:
        if t is None:
            return 0.0
        # An optimizer made after the birth has made fewer steps than the row has lived.
        n = np.minimum(kept.counts, t)
        share = factor(optimizer, kept, n, t)
        # Most steps of bfloat16 are smaller than its resolution, so they are rounded at random.
        random = getattr(optimizer, "bf16_stochastic_round", False)
        random = random and kept.values.dtype == torch.bfloat16
        start = kept.values.float() if random else kept.values
        if decay := _decay(optimizer, kept.group):
            start = start * (1.0 - decay)
        moved = kept.weights.index_select(0, kept.rows).to(start.dtype)
        moved = torch.lerp(start, moved, share.to(start.dtype).expand_as(moved))
        if is_quantized(optimizer, kept.parameter):
            most = largest_step(n, kept.group["betas"][:2]) * float(kept.group["lr"])
            limit = as_column(most, moved)
            moved = start + (moved - start).clamp(-limit, limit)
        kept.weights[kept.rows] = _round_at_random(moved) if random else moved
        return settled_after(*kept.group["betas"][:2])

    return after


def _round_at_random(values: Tensor) -> Tensor:
    """Round float32 to one of the two nearest bfloat16, on average to the values themselves.

    Adds a random number below the bits that bfloat16 lacks, then cuts them off.
    """
    bits = values.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


ADAM = Correction(after=_rescale(_adam))
ADAMAX = Correction(after=_rescale(_adamax))
RADAM = Correction(after=_rescale(_radam))
