"""What a change of slots means to the user's optimizer.

A slot that changes owner starts with empty optimizer state. Adam would then move the newborn rows
too far: its bias correction uses the parameter's step count t, which is large, while their moments
are as young as their own count n, so at beta = (0.9, 0.999) the first updates are about 3 to 6
times too big. :class:`NewbornCorrection` rescales them to what Adam would do with t = n.

Shape letters: P rank slots.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from drlora_torch.layers import ExpertLoRA

SETTLED = 1e-3  # a correction this close to 1 has ended


class Newborn(str, enum.Enum):
    """How newborn rank dimensions meet an optimizer that has been running for long."""

    CORRECTED = "corrected"
    """Under Adam and AdamW they move as if their own step count had just begun."""
    PLAIN = "plain"
    """The optimizer is left alone."""


@torch.no_grad()
def clear_state(optimizer: Optimizer, parameter: nn.Parameter, slots: np.ndarray) -> None:
    """Zero the state that an optimizer keeps for rows of a parameter [P, ...].

    Per-row state has the parameter's number of axes and P rows (Adam, SGD, torch's Adafactor), or
    is the row factor of Transformers' Adafactor.
    """
    index = torch.from_numpy(slots).to(parameter.device)
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        same_rows = value.shape[0] == parameter.shape[0]
        if same_rows and (value.dim() == parameter.dim() or key == "exp_avg_sq_row"):
            value[index] = 0


def adam_ratio(n: np.ndarray, t: float, betas: tuple[float, float]) -> np.ndarray:
    """Step of an Adam whose count is n over that of one whose count is t, for equal moments.

    (1 - b1^t) / (1 - b1^n) * sqrt((1 - b2^n) / (1 - b2^t)), leaving eps aside.

    Example:
        >>> adam_ratio(np.array([1, 1000]), 1000, (0.9, 0.999)).round(3).tolist()
        [0.398, 1.0]
    """
    first, second = betas
    momentum = (1.0 - first**t) / (1.0 - first**n)
    ratio: np.ndarray = momentum * np.sqrt((1.0 - second**n) / (1.0 - second**t))
    return ratio


@dataclasses.dataclass(slots=True)
class _Snapshot:
    """Newborn rows of one parameter as they were before the optimizer's step."""

    parameter: nn.Parameter
    group: dict[str, Any]
    rows: Tensor  # int64 [newborn]
    values: Tensor  # [newborn, features]
    counts: np.ndarray  # own step count n of each row in the coming step


class NewbornCorrection:
    """Rescales the updates of newborn rows under Adam; does nothing under other optimizers.

    ``ages[name][s]`` is the number of optimizer steps that slot s has lived, -1 for slots that are
    free, that were there from the start, or whose correction has ended.
    """

    def __init__(self, loras: Iterable[ExpertLoRA]) -> None:
        self._loras = {lora.name: lora for lora in loras}
        self.ages = {
            name: np.full(lora.table.num_slots, -1, dtype=np.int64)
            for name, lora in self._loras.items()
        }
        self._snapshots: list[_Snapshot] = []
        self._horizon: float | None = None  # set by the Adam steps of the running optimizer step

    def born(self, name: str, slots: np.ndarray) -> None:
        """Begin to correct these slots."""
        self.ages[name][slots] = 0

    def freed(self, name: str, slots: np.ndarray) -> None:
        """Forget these slots."""
        self.ages[name][slots] = -1

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Keep the newborn rows as they are."""
        self._snapshots = []
        if not isinstance(optimizer, Adam):
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, ages in self.ages.items():
            young = np.flatnonzero(ages >= 0)
            if not young.size:
                continue
            for _, projection in self._loras[name].items():
                for parameter in (projection.lora_A, projection.lora_B):
                    if parameter.grad is None or id(parameter) not in groups:
                        continue
                    rows = torch.from_numpy(young).to(parameter.device)
                    self._snapshots.append(
                        _Snapshot(
                            parameter,
                            groups[id(parameter)],
                            rows,
                            parameter.index_select(0, rows),
                            ages[young] + 1,
                        )
                    )

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Shorten the step that the newborn rows have just made."""
        for kept in self._snapshots:
            t = float(optimizer.state[kept.parameter]["step"])
            # An optimizer made after the birth has made fewer steps than the row has lived.
            ratio = adam_ratio(np.minimum(kept.counts, t), t, kept.group["betas"])
            factor = torch.from_numpy(ratio).to(kept.values).unsqueeze(-1)
            start = kept.values
            if kept.group.get("decoupled_weight_decay"):  # AdamW shrinks the row, then moves it
                start = start * (1.0 - float(kept.group["lr"]) * kept.group["weight_decay"])
            moved = kept.parameter.index_select(0, kept.rows)
            kept.parameter[kept.rows] = torch.lerp(start, moved, factor)
            self._horizon = max(self._horizon or 0.0, _settled_after(kept.group["betas"]))
        self._snapshots = []

    def age(self) -> None:
        """Close an optimizer step, to which several optimizers may have contributed."""
        if self._horizon is None:
            return
        for ages in self.ages.values():
            ages[ages >= 0] += 1
            ages[ages > self._horizon] = -1
        self._horizon = None


def _settled_after(betas: tuple[float, float]) -> float:
    """Own steps after which the correction is within SETTLED of 1."""
    return max(math.log(SETTLED) / math.log(beta) if beta > 0 else 0.0 for beta in betas)
