"""The loss of a training over its steps, from its ``metrics.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from drlora_core.ema import FloatArray, IntArray

MOST_STEPS = 10**12


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Losses, and the optimizer steps after which they were taken."""

    steps: IntArray
    """Steps of the training loss, int64 [T]."""
    training: FloatArray
    """Loss on the batch of each step, float64 [T]."""
    held_out_steps: IntArray
    """Steps of the held-out loss, int64 [H]; 0 is the model before the training."""
    held_out: FloatArray
    """Held-out loss, float64 [H]."""

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Losses:
        """Take ``step``, ``loss`` and ``eval_loss`` from logs; of a step logged twice the last.

        Example:
            >>> rows = [{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2}]
            >>> Losses.from_rows(rows).training.tolist()
            [1.5]
        """
        found: dict[str, dict[int, float]] = {"loss": {}, "eval_loss": {}}
        for row in rows:
            if (step := to_step(row.get("step"))) is None:
                continue
            for name, values in found.items():
                if (value := _finite(row.get(name))) is not None:
                    values[step] = value
        parts: list[Any] = []
        for values in found.values():
            steps = sorted(values)
            parts.append(np.array(steps, dtype=np.int64))
            parts.append(np.array([values[step] for step in steps], dtype=np.float64))
        return cls(*parts)

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 if none was."""
        return max(int(steps.max(initial=0)) for steps in (self.steps, self.held_out_steps))


def read_losses(path: Path) -> Losses:
    """Read a ``metrics.jsonl``, also while it is written; without the file there are no losses."""
    return Losses.from_rows(_read_rows(path))


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut off by a crash, or not written to its end yet
            continue
        if isinstance(row, dict):
            yield row


def to_step(value: object) -> int | None:
    """Return a number of optimizer steps, else None."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= MOST_STEPS else None


def _finite(value: object) -> float | None:
    """Return a finite number that JSON holds, else None; a loss that was not finite is null."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return number if math.isfinite(number) else None
