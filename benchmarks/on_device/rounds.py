"""Time and peak memory of several methods, in interleaved rounds.

Every method has one turn per round, in random order; ratios are taken within a round. A turn is a
few steps without a wait in between, after untimed ones.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from benchmarks.methods import Training


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds per step by method and round; by method, bytes above what is held before a step."""

    seconds: dict[str, list[float]]
    peaks: dict[str, int]
    states: dict[str, int]
    """Of LoRA, gradients and optimizer."""
    hosts: dict[str, float]
    """Seconds until a step has been handed to the device."""

    def ratio(self, over: str, under: str) -> Ratio:
        """One method's time over another's."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        low, median, high = np.quantile([a / b for a, b in pairs], [0.25, 0.5, 0.75])
        return Ratio(float(median), float(low), float(high))

    def milliseconds(self, name: str) -> float:
        """Median time of a step."""
        return statistics.median(self.seconds[name]) * 1e3


def interleave(
    trainings: Mapping[str, Training], device: torch.device, rounds: int, steps: int
) -> Measured:
    """Time each method in every round."""
    order, seconds = random.Random(0), {name: [] for name in trainings}
    for step in trainings.values():
        for _ in range(2):
            step()
    peaks = {name: peak(step, device) for name, step in trainings.items()}
    states = {name: training.state_bytes() for name, training in trainings.items()}
    hosts = {name: min(_issue(step, device) for _ in range(3)) for name, step in trainings.items()}
    for _ in range(rounds):
        for name in order.sample(list(trainings), len(trainings)):
            trainings[name]()
            seconds[name].append(_time(trainings[name], device, steps))
    return Measured(seconds, peaks, states, hosts)


def _time(step: Callable[[], None], device: torch.device, steps: int) -> float:
    """Seconds of a step, the mean of a turn."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - started) / steps
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / steps / 1e3


def _issue(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def peak(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that a step takes above what was held before it."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held
