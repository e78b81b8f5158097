"""What a correction of newborn rows is: a step of the optimizer, and what is done around it.

Shape letters: P rank slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch.lora.slots import IntArray

SETTLED = 1e-3  # a correction this close to 1 has ended


class Snapshot(NamedTuple):
    """Newborn rows of one parameter as they were before the optimizer's step."""

    parameter: nn.Parameter
    group: dict[str, Any]
    rows: Tensor  # int64 [newborn]
    values: Tensor  # [newborn, features]
    counts: IntArray  # own step count n of each row in the coming step
    state: dict[str, Tensor]  # rows of the state that the correction needs, [newborn, features]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """How newborn rows move as if their own step count had just begun."""

    after: Callable[[Optimizer, Snapshot], float]
    """Called after the step. Returns the own steps after which rows need no correction, or 0."""
    before: Callable[[Optimizer, Snapshot], None] | None = None
    """Called before the step, with the gradients that it will use."""
    keep: tuple[str, ...] = ()
    """Keys of the state of which the snapshot keeps the rows."""


def count_steps(
    optimizer: Optimizer, parameter: nn.Parameter, group: dict[str, Any]
) -> float | None:
    """t, the steps that the optimizer has made on a parameter; None if it does not say."""
    state = optimizer.state.get(parameter, {})
    count = state.get("step", group.get("step", group.get("k")))
    return None if count is None else float(count)


def settled_after(*betas: float) -> float:
    """Steps after which the bias corrections of averages with these decays have ended."""
    return max((math.log(SETTLED) / math.log(beta) for beta in betas if beta > 0), default=0.0)


def as_column(values: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    """One number for each row, [newborn, 1], with the dtype and device of a tensor."""
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(like).unsqueeze(-1)
