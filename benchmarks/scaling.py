"""Scaling of a drlora step with tokens, experts and rank, compared with the frozen model.

    python -m benchmarks.scaling

Each size is doubled three times, with a fixed number of tokens per expert (or experts per token).
All sizes and both methods are interleaved. A power law is fitted to the medians, by least squares
of log seconds over log size; the exponent is 1 if the cost is proportional.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import typer
from scipy.stats import linregress

from benchmarks import report
from benchmarks.blocks import Case, Shape
from benchmarks.methods import RANK, Builder, drlora, frozen
from benchmarks.options import Rounds
from benchmarks.rounds import interleave

BASE = Shape(experts=32, hidden=512, intermediate=256, top_k=4, tokens=1024)
FACTORS = (1, 2, 4, 8)
BUDGET = 150.0  # seconds
DRLORA, FROZEN = "drlora", "frozen"


@dataclasses.dataclass(frozen=True)
class Fit:
    """Seconds = constant * size ** exponent."""

    swept: str
    method: str
    medians: dict[int, float]
    """Seconds by size."""
    exponent: float
    error: float
    """Standard error of the exponent."""

    @classmethod
    def to(cls, swept: str, method: str, medians: dict[int, float]) -> Fit:
        """Fit log seconds over log size.

        Example:
            >>> fit = Fit.to("tokens", "drlora", {1: 0.5, 2: 1.0, 4: 2.0})
            >>> round(fit.exponent, 6), round(fit.error, 6)
            (1.0, 0.0)
        """
        line = linregress(np.log(list(medians)), np.log(list(medians.values())))
        return cls(swept, method, medians, float(line.slope), float(line.stderr))

    def __str__(self) -> str:
        return f"{self.exponent:.3f} ± {self.error:.3f}"


def shapes(swept: str) -> dict[int, Shape]:
    """Shapes by size; with more experts there are more tokens, so each expert has as many."""
    if swept == "tokens":
        return {BASE.tokens * f: dataclasses.replace(BASE, tokens=BASE.tokens * f) for f in FACTORS}
    return {
        BASE.experts * f: dataclasses.replace(
            BASE, experts=BASE.experts * f, tokens=BASE.tokens * f
        )
        for f in FACTORS
    }


def builders(rank: int) -> dict[str, Builder]:
    """The two methods that are fitted."""
    static = drlora(r_max=2 * rank, growing=False, rank=rank)
    return {DRLORA: static, FROZEN: frozen("grouped_mm")}


def measure(rounds: int | None) -> list[Fit]:
    """Time all sizes in the same rounds, and fit the exponents."""
    steps = {}
    for swept in ("tokens", "experts"):
        for size, shape in shapes(swept).items():
            case = Case(shape, torch.float32)
            for method, build in builders(RANK).items():
                steps[swept, method, size] = build(case)
    base = Case(BASE, torch.float32)
    for rank in (RANK * f for f in FACTORS):
        steps["rank", DRLORA, rank] = builders(rank)[DRLORA](base)
    timings = interleave({str(key): step for key, step in steps.items()}, rounds, BUDGET)
    medians: dict[tuple[str, str], dict[int, float]] = {}
    for swept, method, size in steps:
        of_method = medians.setdefault((swept, method), {})
        of_method[size] = timings.median(str((swept, method, size)))
    return [Fit.to(swept, method, found) for (swept, method), found in medians.items()]


def table(fits: list[Fit]) -> report.Table:
    """One line per sweep and method."""
    about = (
        f"{BASE}, float32, static rank {RANK} unless swept. Experts are swept with a fixed number "
        "of tokens per expert. Exponent ± standard error of the fit to the medians."
    )
    rows = [
        [
            fit.swept,
            fit.method,
            ", ".join(f"{size}: {value * 1e3:.1f}" for size, value in fit.medians.items()),
            str(fit),
        ]
        for fit in fits
    ]
    return report.Table("Scaling", about, ["swept", "method", "size: ms / step", "exponent"], rows)


def main(rounds: Rounds = None) -> None:
    """Measure, print and write the table."""
    found = table(measure(rounds))
    report.write(
        "scaling", "Scaling of a step", found.about, [found._replace(heading="", about="")]
    )


if __name__ == "__main__":
    typer.run(main)
