"""Newborn rows under Adafactor: their second moments are averaged from their own first step on.

Adafactor divides by moving averages whose decay depends on the step, 1 - t^decay_rate. They begin
with the first square; at a late step t, a row that begins at zero would take hundreds of steps to
get there, and its updates would be that much too big. And they would shrink all others, as the
update is clipped as a whole. So the state is set before the step such that the step leaves the
average of the row's own schedule in it, 1 - n^decay_rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from drlora_torch.step.optimizers.correction import (
    GROWN,
    SETTLED,
    Correction,
    Count,
    Snapshot,
    as_column,
    local_state,
)

_FACTORS = {"row_var": "beta2_decay", "exp_avg_sq_row": "decay_rate"}
"""Row factor of the second moment and the group's exponent, of torch and of Transformers."""


def _before(optimizer: Optimizer, kept: Snapshot, count: Count) -> None:
    state = local_state(optimizer, kept.parameter)
    key = next((key for key in _FACTORS if key in state), None)
    if key is None:
        return
    t = (count.double() if isinstance(count, Tensor) else count) + 1.0
    rate, own = kept.group[_FACTORS[key]], kept.counts.clamp(max=t)
    gradient = kept.gradient.index_select(0, kept.rows)
    square = gradient.to(state[key]).square().mean(-1, keepdim=True)
    average = state[key][kept.rows].reshape_as(square)
    wanted = average.lerp(square, as_column(own**rate, square))
    undone = _undo(wanted, square, t**rate)
    # in its first step, the optimizer leaves nothing of what is there
    young = ((kept.counts != GROWN) & (t > 1.0)).reshape(-1, *[1] * (square.dim() - 1))
    undone = torch.where(young, undone, average).reshape(-1, *state[key].shape[1:])
    state[key].index_copy_(0, kept.rows, undone)


def _undo(average: Tensor, square: Tensor, weight: Count) -> Tensor:
    """What has to be there for ``lerp(square, weight)`` to give an average."""
    rest: Count = 1.0 - weight
    if isinstance(weight, Tensor) and isinstance(rest, Tensor):
        weight, rest = weight.to(square), rest.to(square)
    return torch.div(average - weight * square, rest)


def _after(
    optimizer: Optimizer,
    snapshots: Sequence[Snapshot],
    counts: Sequence[Count],
    skipped: Tensor | None,
) -> float:
    groups = [kept.group for kept in snapshots]
    rates = [next(each[name] for name in _FACTORS.values() if name in each) for each in groups]
    return max(float(SETTLED ** (1.0 / rate)) for rate in rates)


ADAFACTOR = Correction(before=_before, after=_after)
