"""Tasks, and generating their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Row = dict[str, str]
"""``prompt`` and ``completion``; the completion includes the leading space."""

TRAIN, VALIDATION, TEST = 3000, 200, 400
"""Number of rows of a generated task."""


@dataclass(frozen=True)
class Task:
    """Rows for training, for choosing a learning rate, and for the report; prompts are disjoint."""

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]

    @property
    def splits(self) -> dict[str, tuple[Row, ...]]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def generate(name: str, draw: Callable[[np.random.Generator, int], Row], seed: int = 0) -> Task:
    """Draw rows with distinct prompts until all splits are full.

    ``draw`` gets the generator and the index of the row. Deterministic.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    rows: dict[str, Row] = {}
    for _ in range(100 * (TRAIN + VALIDATION + TEST)):
        row = draw(rng, len(rows))
        rows.setdefault(row["prompt"], row)
        if len(rows) == TRAIN + VALIDATION + TEST:
            break
    else:
        raise ValueError(f"task {name!r} has only {len(rows)} different prompts")
    ordered = list(rows.values())
    shuffled = [ordered[i] for i in rng.permutation(len(ordered))]
    held_out = tuple(shuffled[TRAIN:])
    return Task(name, tuple(shuffled[:TRAIN]), held_out[:VALIDATION], held_out[VALIDATION:])


def words(rng: np.random.Generator, count: int, syllables: int = 2) -> list[str]:
    """Distinct invented words, such as ``koru``."""
    parts = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(parts[i] for i in rng.integers(len(parts), size=syllables))] = None
    return list(found)
