"""Tasks for the controlled model, in which it is known which expert serves which operation.

An operation is a table that gives every letter a substitute; a completion names each letter before
its substitute. The controlled model (``benchmarks.quality.controlled``) knows one table for each
operation. These tasks replace tables, wholly or for some letters, so what has to be learned about
an operation is the share of its rows times the share of its letters that are new.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.quality.tasks.task import Row, Task, generate

OPERATIONS = ("core", "path", "list", "file", "name", "type", "data", "test")
"""Words of one token, so the first token identifies the operation."""
LETTERS = "abcdefghiklmnoprstvwxy"
Tables = dict[str, dict[str, str]]
"""The substitute of each letter for each operation."""


@dataclass(frozen=True)
class Demand:
    """Frequency of each operation in a task, and the new share of its table."""

    share: dict[str, float]
    new: dict[str, float]

    @property
    def relevance(self) -> dict[str, float]:
        """Share of each operation in what has to be learned; sums to 1."""
        product = {name: self.share[name] * self.new[name] for name in OPERATIONS}
        return {name: value / sum(product.values()) for name, value in product.items()}


def _demand(share: tuple[float, ...], new: tuple[float, ...]) -> Demand:
    """Assign the values to the operations in random order."""
    order = [OPERATIONS[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
    return Demand(
        {name: value / sum(share) for name, value in zip(order, share, strict=True)},
        dict(zip(order, new, strict=True)),
    )


DEMANDS: dict[str, Demand] = {
    "controlled_share": _demand((8, 4, 2, 1, 0.5, 0.25, 0, 0), (1.0,) * 8),
    "controlled_need": _demand((8, 6, 4, 3, 2, 1.5, 1, 0.5), (0, 0, 0.1, 0.4, 1, 1, 0.5, 1)),
}
"""In the first, relevance is the frequency of an operation. In the second, frequency misleads: the
model already knows the most frequent operations."""


def known_tables() -> Tables:
    """The tables that the controlled model was pretrained on."""
    rng = np.random.default_rng(71)
    return {
        name: dict(zip(LETTERS, rng.permutation(list(LETTERS)).tolist(), strict=True))
        for name in OPERATIONS
    }


def new_tables(demand: Demand) -> Tables:
    """The known tables, in which the demanded share of letters gets a new substitute."""
    rng, tables = np.random.default_rng(72), known_tables()
    for name, table in tables.items():
        changed = rng.permutation(list(LETTERS))[: round(demand.new[name] * len(LETTERS))].tolist()
        moved = [table[letter] for letter in [*changed[1:], *changed[:1]]]
        table.update(zip(changed, moved, strict=True))
    return tables


def draw_row(tables: Tables, operation: str, length: int, rng: np.random.Generator) -> Row:
    """Draw a row: the word of the operation and letters; then each letter with its substitute."""
    letters = [LETTERS[i] for i in rng.integers(len(LETTERS), size=length)]
    pairs = [f" {letter} {tables[operation][letter]}" for letter in letters]
    return {"prompt": f"{operation} {' '.join(letters)} ->", "completion": "".join(pairs)}


def controlled(name: str) -> Task:
    """A task of ``DEMANDS``."""
    demand = DEMANDS[name]
    tables, shares = new_tables(demand), [demand.share[operation] for operation in OPERATIONS]

    def draw(rng: np.random.Generator, _: int) -> Row:
        operation = OPERATIONS[rng.choice(len(OPERATIONS), p=shares)]
        return draw_row(tables, operation, int(rng.integers(3, 6)), rng)

    return generate(name, draw)
