"""Interleaved timing of several methods.

Every method has one turn per round, in random order. Ratios are taken within a round, and then the
median over rounds, so drift of the machine affects both sides. A turn takes as many steps as fill
``TURN`` seconds, after one untimed step, which restores caches and allocator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

TURN = 0.3  # seconds
FEWEST, MOST = 5, 25  # rounds

Step = Callable[[], None]


class Spread(NamedTuple):
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """From one value per round.

        Example:
            >>> str(Spread.of([1.0, 1.1, 1.2, 1.3, 9.9]))
            '1.200 (1.100 to 1.300)'
        """
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds per step, by method and round."""

    seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds[name])

    def faster(self, *names: str) -> str:
        """The method with the smaller median."""
        return min(names, key=self.median)

    def ratio(self, name: str, over: str) -> Spread:
        """Ratio of the times of two methods within a round.

        Example:
            >>> timings = Timings({"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 12.0]})
            >>> timings.ratio("b", "a").median
            2.0
        """
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return Spread.of([a / b for a, b in pairs])


def interleave(steps: Mapping[str, Step], rounds: int | None, budget: float = 90.0) -> Timings:
    """Time all steps, interleaved.

    Args:
        steps: one training step of each method.
        rounds: number of rounds; None: as many as fit the budget, from ``FEWEST`` to ``MOST``.
        budget: seconds for all rounds.
    """
    with _short_collections():
        repeats = {name: _repeats(step) for name, step in steps.items()}
        if rounds is None:
            round_seconds = sum((1 + count) * seconds for count, seconds in repeats.values())
            rounds = max(FEWEST, min(MOST, int(budget / round_seconds)))
        taken: dict[str, list[float]] = {name: [] for name in steps}
        order, generator = list(steps), random.Random(0)
        for _ in track(range(rounds), description="rounds", console=Console(stderr=True)):
            generator.shuffle(order)
            for name in order:
                taken[name].append(_turn(steps[name], repeats[name][0]))
    return Timings(taken)


@contextlib.contextmanager
def _short_collections() -> Iterator[None]:
    """Exclude existing objects from garbage collection, which would take 0.3 s each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _repeats(step: Step) -> tuple[int, float]:
    """Number of steps that fill a turn, and seconds per step, after two warmup steps."""
    step()
    seconds = _turn(step, 1)
    return max(1, math.ceil(TURN / seconds)), seconds


def _turn(step: Step, count: int) -> float:
    gc.collect()
    step()
    started = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - started) / count
