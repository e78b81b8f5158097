"""How the cost of a drlora step grows with tokens, experts and rank.

    python -m benchmarks.scaling

Each size is doubled in turn, with the tokens of an expert (or the experts of a token) held fixed,
and a power law is fitted to the medians. An exponent of 1 is proportional cost.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks import report
from benchmarks.expert_step import Shape, drlora

BASE = Shape(experts=32, hidden=512, intermediate=256, top_k=4, tokens=1024)
RANKS = (16, 32, 64, 128)


def shapes_by_tokens() -> dict[int, Shape]:
    """More tokens for the same experts."""
    return {n: dataclasses.replace(BASE, tokens=n) for n in (1024, 2048, 4096, 8192)}


def shapes_by_experts() -> dict[int, Shape]:
    """More experts, each with as many tokens as before."""
    return {
        n: dataclasses.replace(BASE, experts=n, tokens=BASE.tokens * n // BASE.experts)
        for n in (32, 64, 128, 256)
    }


def seconds(steps: dict[int, Callable[[], None]], rounds: int) -> dict[int, float]:
    """Median seconds of each step, all sizes in turn within a round."""
    taken: dict[int, list[float]] = {size: [] for size in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for size, step in steps.items():
            started = time.perf_counter()
            step()
            taken[size].append(time.perf_counter() - started)
    return {size: statistics.median(times) for size, times in taken.items()}


def exponent(medians: dict[int, float]) -> float:
    """Slope of log seconds over log size."""
    slope, _ = np.polyfit(np.log(list(medians)), np.log(list(medians.values())), 1)
    return float(slope)


def main(rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 9) -> None:
    """Measure and write the table."""
    build = drlora(r_max=32, growing=False)
    sweeps: dict[str, dict[int, Callable[[], None]]] = {
        "tokens": {n: build(s, torch.float32) for n, s in shapes_by_tokens().items()},
        "experts": {n: build(s, torch.float32) for n, s in shapes_by_experts().items()},
        "rank": {r: drlora(r_max=2 * r, growing=False, rank=r)(BASE, torch.float32) for r in RANKS},
    }
    rows = []
    for name, steps in sweeps.items():
        medians = seconds(steps, rounds)
        shown = ", ".join(f"{size}: {value * 1e3:.0f}" for size, value in medians.items())
        rows.append([name, shown, f"{exponent(medians):.2f}"])
    about = f"{BASE}, float32, static rank 16 unless swept; medians of {rounds} interleaved rounds."
    report.write("scaling", about, ["swept", "size: ms / step", "exponent"], rows)


if __name__ == "__main__":
    typer.run(main)
