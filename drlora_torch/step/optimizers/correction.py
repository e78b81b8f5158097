"""What a correction of newborn rows is: a step of the optimizer, and what is done around it.

Shape letters: P rank slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch.lora import parts

Count = float | Tensor
"""A step count t: a number where the host knows it, else a tensor [] or [newborn] on a device."""
SETTLED = 1e-3  # a correction this close to 1 has ended
GROWN = math.inf
"""Own step count of a row that needs no correction any more. It counts as t, of which all factors
are exactly 1."""


class Snapshot(NamedTuple):
    """Newborn rows of one parameter as they were before the optimizer's step."""

    parameter: nn.Parameter
    weights: Tensor  # what this process holds of it, [p, features]; shares its memory
    gradient: Tensor  # likewise
    group: dict[str, Any]
    rows: Tensor  # int64 [newborn], of those held here
    values: Tensor  # [newborn, features]
    counts: Tensor  # float64 [newborn], own step count n of each row in the coming step
    state: dict[str, Tensor]  # rows of the state that the correction needs, [newborn, features]


After = Callable[[Optimizer, Sequence[Snapshot], Sequence[Count], Tensor | None], float]
"""Called after the step, with t of each snapshot, and whether the step was skipped, bool [] on a
device; None: it was not. Returns the own steps after which rows need no correction, or 0."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """How newborn rows move as if their own step count had just begun."""

    after: After
    before: Callable[[Optimizer, Snapshot, Count], None] | None = None
    """Called before the step, with t and the gradients that it will use."""
    keep: tuple[str, ...] = ()
    """Keys of the state of which the snapshot keeps the rows."""


def count_steps(
    optimizer: Optimizer, snapshots: Sequence[Snapshot]
) -> tuple[list[Snapshot], list[Count]]:
    """The snapshots of parameters that have a step count, and t, the steps made on each.

    A count that lies beside its parameter stays there, since reading it would wait for the device.
    """
    found = [(kept, find_count(optimizer, kept.parameter, kept.group)) for kept in snapshots]
    found = [(kept, count) for kept, count in found if count is not None]
    counts = [_as_count(count, kept.weights.device) for kept, count in found]
    return [kept for kept, _ in found], counts


def _as_count(count: Any, device: torch.device) -> Count:
    beside = isinstance(count, Tensor) and count.device == device
    return count.detach().reshape(()) if beside else float(count)


def local_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The state of a parameter, of which tensors are what this process holds."""
    state = optimizer.state.get(parameter, {})
    return {k: parts.local(v) if isinstance(v, Tensor) else v for k, v in state.items()}


def find_count(optimizer: Optimizer, parameter: nn.Parameter, group: dict[str, Any]) -> Any:
    """The step count of a parameter, a number or tensor; None if there is none."""
    state = optimizer.state.get(parameter, {})
    return state.get("step", group.get("step", group.get("k")))


def settled_after(*betas: float) -> float:
    """Steps after which the bias corrections of averages with these decays have ended."""
    return max((math.log(SETTLED) / math.log(beta) for beta in betas if beta > 0), default=0.0)


def as_column(values: Tensor, like: Tensor) -> Tensor:
    """One number for each row, [newborn, 1], with the dtype and device of a tensor."""
    return values.to(like).unsqueeze(-1)


def write_rows(kept: Snapshot, moved: Tensor, skipped: Tensor | None) -> None:
    """Give newborn rows the values [newborn, features] that a step leaves, if it was one."""
    if skipped is not None:
        now = kept.weights.index_select(0, kept.rows)
        moved = torch.where(skipped.to(moved.device), now, moved.to(now.dtype))
    kept.weights.index_copy_(0, kept.rows, moved.to(kept.weights.dtype))
