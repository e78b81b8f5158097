"""Newborn rows under Adam and its kin: the update is rescaled to that of a young bias correction.

With equal moments, the updates of an optimizer whose count is n and of one whose count is t differ
by a factor only, which depends on n, t and the betas. Epsilon is left aside: rows whose gradients
are not much larger than it move less than under a fresh Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from drlora_torch.step.optimizers.codes import is_quantized
from drlora_torch.step.optimizers.correction import (
    GROWN,
    After,
    Correction,
    Count,
    Snapshot,
    as_column,
    local_state,
    settled_after,
    write_rows,
)
from drlora_torch.step.optimizers.names import algorithm

Ratio = Callable[[Tensor, Count, tuple[float, ...]], Tensor]
"""From n of each row, t and the betas to the factor of its update, all float64 [newborn]."""
Factors = Callable[[Optimizer, Sequence[Snapshot], Sequence[Count]], list[Tensor]]
"""From t of each snapshot to the factors of its updates, [newborn, 1] or [newborn, features]."""


def adam_ratio(n: Tensor, t: Count, betas: tuple[float, ...]) -> Tensor:
    """Step of an Adam whose count is n over that of one whose count is t, for equal moments.

    (1 - b1^t) / (1 - b1^n) * sqrt((1 - b2^n) / (1 - b2^t)), leaving eps aside.

    Example:
        >>> n = torch.tensor([1, 1000], dtype=torch.float64)
        >>> adam_ratio(n, 1000, (0.9, 0.999)).numpy().round(3).tolist()
        [0.398, 1.0]
    """
    first, second = betas[:2]
    momentum = (1.0 - first**t) / (1.0 - first**n)
    return momentum * torch.sqrt((1.0 - second**n) / (1.0 - second**t))


def largest_step(n: Tensor, betas: tuple[float, ...]) -> Tensor:
    """Largest update of an Adam at count n, over its learning rate, whatever the gradients.

    By Cauchy and Schwarz, sqrt(sum a_k^2 / c_k), where a_k and c_k are the weights that the two
    moments give to the gradient k steps ago. Block-wise state can exceed it: the second moments of
    a row are rounded to zero next to much larger ones in their block.

    Example:
        >>> n = torch.tensor([1, 10, 10_000], dtype=torch.float64)
        >>> largest_step(n, (0.9, 0.999)).numpy().round(2).tolist()
        [1.0, 1.04, 7.27]
    """
    first, second = betas[:2]
    ratio = first**2 / second
    terms = n if ratio == 1.0 else (1.0 - ratio**n) / (1.0 - ratio)
    momentum = (1.0 - first) / (1.0 - first**n)
    return momentum * torch.sqrt((1.0 - second**n) / (1.0 - second) * terms)


def rectification(n: Tensor, beta: float, least: float) -> Tensor:
    """r of RAdam (arXiv 1908.03265, algorithm 2) at count n; 0 up to the length ``least``."""
    limit = 2.0 / (1.0 - beta) - 1.0
    length = limit - 2.0 * n * beta**n / (1.0 - beta**n)
    long = length.clamp(min=least)
    squared = (long - 4.0) * (long - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * long)
    return torch.where(length > least, torch.sqrt(squared), 0.0)


def _adamax_ratio(n: Tensor, t: Count, betas: tuple[float, ...]) -> Tensor:
    """The infinity norm has no bias."""
    return (1.0 - betas[0] ** t) / (1.0 - betas[0] ** n)


def _by_ratio(ratio: Ratio) -> Factors:
    """Factors that depend on the counts alone: computed for all rows of a device at once."""

    def factors(
        optimizer: Optimizer, snapshots: Sequence[Snapshot], counts: Sequence[Count]
    ) -> list[Tensor]:
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, kept in enumerate(snapshots):
            key = (kept.values.device, kept.values.dtype, tuple(kept.group["betas"][:2]))
            alike.setdefault(key, []).append(place)
        found: dict[int, Tensor] = {}
        for (_, dtype, betas), places in alike.items():
            ns = [snapshots[i].counts for i in places]
            n, t = _join(ns, [counts[i] for i in places])
            column = ratio(_own_count(n, t), t, betas).to(dtype).unsqueeze(-1)
            found |= dict(zip(places, torch.split(column, [len(each) for each in ns]), strict=True))
        return [found[place] for place in range(len(snapshots))]

    return factors


def _join(ns: Sequence[Tensor], counts: Sequence[Count]) -> tuple[Tensor, Count]:
    """n of all rows, and t of each of them; a number where it is the same for all."""
    joined = torch.cat(list(ns))
    if not isinstance(counts[0], Tensor) and len(set(counts)) == 1:
        return joined, counts[0]
    pairs = zip(ns, counts, strict=True)
    rows = [t.expand_as(n) if isinstance(t, Tensor) else torch.full_like(n, t) for n, t in pairs]
    return joined, torch.cat(rows).double()


def _own_count(n: Tensor, t: Count) -> Tensor:
    """An optimizer made after the birth has made fewer steps than the row has lived."""
    return n.clamp(max=t)


def _radam(
    optimizer: Optimizer, snapshots: Sequence[Snapshot], counts: Sequence[Count]
) -> list[Tensor]:
    """In its first steps, RAdam does not divide by the second moment."""

    def size(kept: Snapshot, count: Tensor) -> Tensor:
        first, second = kept.group["betas"]
        state = local_state(optimizer, kept.parameter)
        denominator = state["exp_avg_sq"].index_select(0, kept.rows).sqrt() + kept.group["eps"]
        rectified = rectification(count, second, 5.0)
        scale = as_column(rectified * torch.sqrt(1.0 - second**count), kept.values)
        return torch.where(scale > 0, scale, denominator) / as_column(1.0 - first**count, scale)

    return [
        size(kept, _own_count(kept.counts, t)) / size(kept, torch.zeros_like(kept.counts) + t)
        for kept, t in zip(snapshots, counts, strict=True)
    ]


def _decay(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """Weight decay that shrinks the row before the update moves it, as AdamW does.

    A number, or a tensor as the learning rate may be.
    """
    decoupled = (
        group.get("decoupled_weight_decay")  # torch
        or getattr(optimizer, "is_adamw", False)  # torchao
        or algorithm(optimizer) == "adam"  # bitsandbytes, under the name Adam too
    )
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    return lr * group["weight_decay"] if decoupled and group["weight_decay"] else 0.0


def _rescale(factors: Factors) -> After:
    def after(
        optimizer: Optimizer,
        snapshots: Sequence[Snapshot],
        counts: Sequence[Count],
        skipped: Tensor | None,
    ) -> float:
        shares = factors(optimizer, snapshots, counts)
        starts = _starts(optimizer, snapshots)
        ends = [
            kept.weights.index_select(0, kept.rows).to(start.dtype)
            for kept, start in zip(snapshots, starts, strict=True)
        ]
        shares = [
            share.to(end.dtype).expand_as(end) for share, end in zip(shares, ends, strict=True)
        ]
        moved = list(torch._foreach_lerp(starts, ends, shares))
        for place, (kept, t) in enumerate(zip(snapshots, counts, strict=True)):
            if is_quantized(optimizer, kept.parameter):
                moved[place] = _limit(kept, t, starts[place], moved[place])
            if moved[place].dtype != kept.values.dtype:  # see _starts
                moved[place] = _round_at_random(moved[place])
            write_rows(kept, moved[place], skipped)
        return max(settled_after(*kept.group["betas"][:2]) for kept in snapshots)

    return after


def _starts(optimizer: Optimizer, snapshots: Sequence[Snapshot]) -> list[Tensor]:
    """Where the updates of the rows began: their values, after weight decay.

    Most steps of bfloat16 are smaller than its resolution; an optimizer that rounds them at random
    is followed in float32.
    """
    starts = [kept.values for kept in snapshots]
    if getattr(optimizer, "bf16_stochastic_round", False):
        starts = [each.float() if each.dtype == torch.bfloat16 else each for each in starts]
    decays = [_decay(optimizer, kept.group) for kept in snapshots]
    if any(isinstance(decay, Tensor) for decay in decays):
        return [start * (1.0 - decay) for start, decay in zip(starts, decays, strict=True)]
    if not any(decays):
        return starts
    return list(torch._foreach_mul(starts, [1.0 - decay for decay in decays]))


def _limit(kept: Snapshot, t: Count, start: Tensor, end: Tensor) -> Tensor:
    """Move the rows no further than an Adam of their age can."""
    most = largest_step(_own_count(kept.counts, t), kept.group["betas"]) * kept.group["lr"]
    limit = as_column(most, end)
    limited = start + (end - start).clamp(-limit, limit)
    return torch.where((kept.counts == GROWN).unsqueeze(-1), end, limited)


def _round_at_random(values: Tensor) -> Tensor:
    """Round float32 to one of the two nearest bfloat16, on average to the values themselves.

    Adds a random number below the bits that bfloat16 lacks, then cuts them off.
    """
    bits = values.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()


ADAM = Correction(after=_rescale(_by_ratio(adam_ratio)))
ADAMAX = Correction(after=_rescale(_by_ratio(_adamax_ratio)))
RADAM = Correction(after=_rescale(_radam))
