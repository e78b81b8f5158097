"""What a correction of newborn rows is: a step of the optimizer, and what is done around it.

Shape letters: P rank slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch.lora import parts
from drlora_torch.lora.slots import IntArray

SETTLED = 1e-3  # a correction this close to 1 has ended


class Snapshot(NamedTuple):
    """Newborn rows of one parameter as they were before the optimizer's step."""

    parameter: nn.Parameter
    weights: Tensor  # what this process holds of it, [p, features]; shares its memory
    gradient: Tensor  # likewise
    group: dict[str, Any]
    rows: Tensor  # int64 [newborn], of those held here
    values: Tensor  # [newborn, features]
    counts: IntArray  # own step count n of each row in the coming step
    state: dict[str, Tensor]  # rows of the state that the correction needs, [newborn, features]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """How newborn rows move as if their own step count had just begun."""

    after: Callable[[Optimizer, Snapshot, float | None], float]
    """Called after the step, with t. Returns the own steps after which rows need no correction, or
    0."""
    before: Callable[[Optimizer, Snapshot, float | None], None] | None = None
    """Called before the step, with t and the gradients that it will use."""
    keep: tuple[str, ...] = ()
    """Keys of the state of which the snapshot keeps the rows."""


def count_steps(optimizer: Optimizer, snapshots: Sequence[Snapshot]) -> list[float | None]:
    """t, the steps that the optimizer has made on each parameter; None if it does not say.

    Counts on a GPU are read together: each read would wait for it.
    """
    counts = [find_count(optimizer, kept.parameter, kept.group) for kept in snapshots]
    tensors = [count for count in counts if isinstance(count, Tensor)]
    places: dict[torch.device, list[Tensor]] = {}
    for count in tensors:
        places.setdefault(count.device, []).append(count.detach().reshape(()))
    read = {where: iter(torch.stack(each).tolist()) for where, each in places.items()}
    return [
        next(read[count.device])
        if isinstance(count, Tensor)
        else None
        if count is None
        else float(count)
        for count in counts
    ]


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


def as_column(values: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    """One number for each row, [newborn, 1], with the dtype and device of a tensor."""
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(like).unsqueeze(-1)
