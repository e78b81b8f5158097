"""Cost of a training step against goals, in time, memory and scaling.

    python -m benchmarks.goals                            # all shapes and dtypes, then scaling
    python -m benchmarks.goals --shape small --dtype float32 --no-scaling

Times are ratios within interleaved rounds (benchmarks/rounds.py); memory is counted in bytes of
tensors (benchmarks/memory.py).
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import memory, methods, report, rounds, scaling
from benchmarks.blocks import DTYPES, SHAPES, Case
from benchmarks.methods import METHODS, RANK
from benchmarks.options import Dtypes, Rounds, Shapes
from benchmarks.rounds import Spread, Timings

STEP = "training step / frozen model's forward and backward"
OVER_PEFT = "training step / PEFT LoRA"
MEMORY = "peak memory above the frozen model / the same of PEFT"
GROWING = "dynamic / static rank"
R_MAX_TIME = "r_max = 4 r_target / r_max = r_target, time"
R_MAX_MEMORY = "r_max = 4 r_target / r_max = r_target, peak memory"
STATE = "LoRA weights, gradients and Adam state / the same of PEFT, r_max = {} r_target"
NOISE = "frozen model / itself (noise)"


@dataclasses.dataclass(frozen=True)
class Goal:
    """One line of the table; without ``limit`` it is for comparison only."""

    what: str
    where: str
    limit: float | None
    measured: float
    shown: str

    @classmethod
    def of(cls, what: str, where: str, limit: float | None, measured: float | Spread) -> Goal:
        """Make a goal from a count, or from ratios over the rounds."""
        if isinstance(measured, Spread):
            return cls(what, where, limit, measured.median, str(measured))
        return cls(what, where, limit, measured, f"{measured:.3f}")

    @property
    def verdict(self) -> str:
        """Cell that says whether the goal is met."""
        if self.limit is None:
            return "-"
        return "yes" if self.measured <= self.limit else f"no, by {self.measured - self.limit:.3f}"

    def row(self) -> list[str]:
        """Cells of the table."""
        limit = "-" if self.limit is None else f"<= {self.limit:.2f}"
        return [self.what, self.where, limit, self.shown, self.verdict]


@dataclasses.dataclass(frozen=True)
class Counted:
    """Memory of one method in bytes."""

    step: int
    """Peak of a step, above what was held before it."""
    training: int
    """Peak of training, with LoRA and optimizer state, without frozen weights."""
    state: int
    """LoRA weights, gradients and optimizer state."""
    table: int
    """Owner table of the rank slots."""


def count(case: Case, builder: methods.Builder) -> Counted:
    """Count the memory of a method over two steps."""
    built: list[methods.Training] = []

    def start() -> None:
        built.append(builder(case))
        built[0]()

    def step() -> None:
        built[0]()

    of_step, training = memory.training_peaks(start, step)
    return Counted(of_step, training, built[0].state_bytes(), built[0].table_bytes())


def step_goals(where: str, timings: Timings, counted: dict[str, Counted]) -> list[Goal]:
    """Goals for one shape and dtype."""
    best = timings.faster(methods.FROZEN, methods.EAGER)
    base = min(counted[name].training for name in (methods.FROZEN, methods.EAGER))
    above = {name: counts.training - base for name, counts in counted.items()}
    low, high = counted[methods.LOW_MAX], counted[methods.HIGH_MAX]
    uniform = counted[methods.PEFT].state
    found = [
        (STEP, 1.05, timings.ratio(methods.DYNAMIC, best)),
        (OVER_PEFT, 0.35, timings.ratio(methods.DYNAMIC, methods.PEFT)),
        (MEMORY, 0.15, above[methods.DYNAMIC] / above[methods.PEFT]),
        (GROWING, 1.03, timings.ratio(methods.DYNAMIC, methods.STATIC)),
        (R_MAX_TIME, 1.02, timings.ratio(methods.HIGH_MAX, methods.LOW_MAX)),
        (R_MAX_MEMORY, 1.02, high.training / low.training),
        (STATE.format(2), 1.0, counted[methods.DYNAMIC].state / uniform),
        (STATE.format(4), 1.0, high.state / uniform),
        (NOISE, None, timings.ratio(methods.AGAIN, methods.FROZEN)),
    ]
    return [Goal.of(what, where, limit, measured) for what, limit, measured in found]


def method_rows(timings: Timings, counted: dict[str, Counted]) -> list[list[str]]:
    """One line per method: time, ratios, memory."""
    best = timings.faster(methods.FROZEN, methods.EAGER)
    return [
        [
            name,
            f"{timings.median(name):.4f}",
            str(timings.ratio(name, best)),
            f"{timings.median(name) / timings.median(methods.PEFT):.3f}",
            *(f"{value / 2**20:,.1f}" for value in dataclasses.astuple(counted[name])[:3]),
            f"{counted[name].table / 2**10:,.0f}",
        ]
        for name in timings.seconds
    ]


COLUMNS = [
    "method",
    "s / step",
    "/ frozen",
    "/ PEFT",
    "peak of a step, MiB",
    "peak of training, MiB",
    "LoRA state, MiB",
    "owner table, KiB",
]
ABOUT = (
    f"Rank {RANK}. Frozen: forward, and backward to the inputs, with the faster of the grouped_mm "
    "and eager experts of Transformers. The other methods include AdamW (fused); drlora includes "
    "statistics and growth, from half the rank. Ratios: median (quartiles) over interleaved "
    "rounds. Memory: peak bytes of tensors, with LoRA and optimizer state, without frozen weights."
)


def measure(case: Case, count_of_rounds: int | None) -> tuple[Timings, dict[str, Counted]]:
    """Measure time and memory of all methods on one case."""
    trainings = {name: build(case) for name, build in METHODS.items()}
    timings = rounds.interleave(trainings, count_of_rounds)
    trainings.clear()
    gc.collect()  # adapters and models refer to each other
    return timings, {name: count(case, build) for name, build in METHODS.items()}


def scaling_goals(fits: Iterable[scaling.Fit]) -> list[Goal]:
    """Goals for the exponents."""
    return [
        Goal(f"exponent of time against {f.swept}", "scaling", 1.05, f.exponent, str(f))
        for f in fits
        if f.method == scaling.DRLORA
    ]


def main(
    shape: Shapes = None,
    dtype: Dtypes = None,
    rounds: Rounds = None,
    scale: Annotated[bool, typer.Option("--scaling/--no-scaling", help="Exponents too.")] = True,
) -> None:
    """Measure, print and write the tables."""
    stem = "_".join(["step_goals", *(shape or []), *(dtype or [])])
    goals: list[Goal] = []
    details: list[report.Table] = []
    for name in shape or SHAPES:
        for kind in dtype or DTYPES:
            timings, counted = measure(Case(SHAPES[name], DTYPES[kind]), rounds)
            goals += step_goals(f"{name}, {kind}", timings, counted)
            heading = f"{name}, {kind}"
            about = f"{SHAPES[name]}; {timings.rounds} rounds."
            table = report.Table(heading, about, COLUMNS, method_rows(timings, counted))
            typer.echo("\n".join(table.lines()), err=True)
            details.append(table)
            write(stem, goals, details)  # keeps the results if a later case fails
    if scale:
        fits = scaling.measure(rounds)
        goals += scaling_goals(fits)
        details.append(scaling.table(fits))
    typer.echo(write(stem, goals, details).read_text())


def write(stem: str, goals: list[Goal], details: list[report.Table]) -> Path:
    """Write the results so far."""
    rows = [goal.row() for goal in sorted(goals, key=lambda goal: goal.what != STEP)]
    table = report.Table("Goals", "", ["what", "where", "goal", "measured", "met"], rows)
    return report.write(stem, "Cost of a training step", ABOUT, [table, *details], show=False)


if __name__ == "__main__":
    typer.run(main)
