"""Newborn rows under Adafactor: their second moments are averaged from their own first step on.

Adafactor divides by moving averages whose decay depends on the step, 1 - t^decay_rate. They begin
with the first square; at a late step t, a row that begins at zero would take hundreds of steps to
get there, and its updates would be that much too big. And they would shrink all others, as the
update is clipped as a whole. So the state is set before the step such that the step leaves the
average of the row's own schedule in it, 1 - n^decay_rate.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from drlora_torch.step.optimizers.correction import (
    SETTLED,
    Correction,
    Snapshot,
    as_column,
    local_state,
)

_FACTORS = {"row_var": "beta2_decay", "exp_avg_sq_row": "decay_rate"}
"""Row factor of the second moment and the group's exponent, of torch and of Transformers."""


def _before(optimizer: Optimizer, kept: Snapshot, count: float | None) -> None:
    state = local_state(optimizer, kept.parameter)
    key = next((key for key in _FACTORS if key in state), None)
    if key is None or not count:
        return
    t, rate = count + 1.0, kept.group[_FACTORS[key]]
    gradient = kept.gradient.index_select(0, kept.rows)
    square = gradient.to(state[key]).square().mean(-1, keepdim=True)
    average = state[key][kept.rows].reshape_as(square)
    own = as_column(np.minimum(kept.counts, t) ** rate, square)
    state[key][kept.rows] = _undo(average.lerp(square, own), square, t**rate).reshape(
        kept.rows.numel(), *state[key].shape[1:]
    )


def _undo(average: Tensor, square: Tensor, weight: float) -> Tensor:
    """What has to be there for ``lerp(square, weight)`` to give an average."""
    return (average - weight * square) / (1.0 - weight)


def _after(optimizer: Optimizer, kept: Snapshot, count: float | None) -> float:
    rate = next(kept.group[name] for name in _FACTORS.values() if name in kept.group)
    return float(SETTLED ** (1.0 / rate))


ADAFACTOR = Correction(before=_before, after=_after)
