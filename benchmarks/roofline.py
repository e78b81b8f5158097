"""Lower bound of the cost of a drlora step, and the measured cost.

    python -m benchmarks.roofline
    python -m benchmarks.roofline --shape small --dtype bfloat16

Operations and bytes of the frozen step, the low-rank products, AdamW and the statistics are counted
(benchmarks/counts.py) and divided by the peak performance of this machine (benchmarks/ceilings.py)
for products of the same shapes and for memory copies. Two predictions of the ratio of a drlora step
to a frozen one:

- *added*: the measured frozen step, plus the added work at peak performance. Beating it needs a
  frozen part that is faster than that of Transformers.
- *bound*: the products of the experts at peak performance too, and nothing else: no gate, no
  gathering, no routing. No implementation that multiplies these matrices one by one is faster.
"""

from __future__ import annotations

import dataclasses

import torch
import typer

from benchmarks import ceilings, counts, report
from benchmarks.blocks import DTYPES, SHAPES, Case, Shape
from benchmarks.counts import Gemm
from benchmarks.methods import DYNAMIC, EAGER, FROZEN, METHODS, RANK, STATIC
from benchmarks.options import Dtypes, Rounds, Shapes
from benchmarks.rounds import Timings, interleave


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the step at peak performance."""

    what: str
    operations: int
    bytes: int
    seconds: float

    def row(self, where: str, frozen: float) -> list[str]:
        """Cells of the table; ``frozen``: seconds of the frozen step."""
        return [
            where,
            self.what,
            f"{self.operations / 1e9:.2f}",
            f"{self.bytes / 1e6:,.0f}",
            f"{self.operations / self.seconds / 1e9:,.0f}",
            f"{self.bytes / self.seconds / 1e9:,.1f}",
            f"{self.seconds * 1e3:.1f}",
            f"{self.seconds / frozen:.3f}",
        ]


PARTS = [
    "case",
    "part",
    "GFLOP",
    "MB",
    "GFLOP/s",
    "GB/s",
    "ms at the ceiling",
    "/ frozen, measured",
]


def products(what: str, gemms: list[Gemm], dtype: torch.dtype, cold: bool) -> Part:
    """Products, at the peak performance for their shapes."""
    seconds = sum(ceilings.gemm_seconds(gemm, dtype, cold) for gemm in gemms)
    moved = sum(gemm.bytes(dtype) for gemm in gemms)
    return Part(what, sum(gemm.operations for gemm in gemms), moved, seconds)


def added_parts(shape: Shape, dtype: torch.dtype, bandwidth: float) -> list[Part]:
    """The parts of a drlora step that a frozen step does not have."""
    numbers = counts.trained(shape, RANK)
    moved = {
        "AdamW": numbers * counts.ADAMW_BYTES,
        "statistics": numbers * counts.STATISTICS_BYTES,
    }
    low_rank = products("low-rank products", counts.lora_gemms(shape, RANK), dtype, cold=False)
    return [low_rank, *(Part(what, 0, n, n / bandwidth) for what, n in moved.items())]


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Parts of one case at peak performance, and measured times."""

    where: str
    base: Part
    added: list[Part]
    timings: Timings

    @property
    def frozen(self) -> str:
        """The faster frozen method."""
        return self.timings.faster(FROZEN, EAGER)

    def part_rows(self) -> list[list[str]]:
        """One line per part."""
        seconds = self.timings.median(self.frozen)
        return [part.row(self.where, seconds) for part in (self.base, *self.added)]

    def ratio_row(self) -> list[str]:
        """Predicted and measured ratios of a drlora step to a frozen one."""
        seconds = self.timings.median(self.frozen)
        added = sum(part.seconds for part in self.added)
        return [
            self.where,
            f"{seconds * 1e3:.0f}",
            f"{(self.base.seconds + added) / seconds:.3f}",
            f"{1 + added / seconds:.3f}",
            str(self.timings.ratio(STATIC, self.frozen)),
            str(self.timings.ratio(DYNAMIC, self.frozen)),
        ]


RATIOS = [
    "case",
    "frozen, ms",
    "bound",
    "added",
    "measured, static rank",
    "measured, dynamic",
]


def measure(name: str, kind: str, bandwidth: float, rounds: int | None) -> Roofline:
    """Peak performance and interleaved times of one case."""
    shape, dtype = SHAPES[name], DTYPES[kind]
    gemms = counts.base_gemms(shape) + counts.router_gemms(shape)
    base = products("experts' and router's own products", gemms, dtype, cold=True)
    added = added_parts(shape, dtype, bandwidth)
    case = Case(shape, dtype)
    steps = {method: METHODS[method](case) for method in (FROZEN, EAGER, STATIC, DYNAMIC)}
    return Roofline(f"{name}, {kind}", base, added, interleave(steps, rounds, 45.0))


def main(
    shape: Shapes = None,
    dtype: Dtypes = None,
    rounds: Rounds = None,
) -> None:
    """Measure, print and write the tables."""
    bandwidth = ceilings.bandwidth()
    kinds = dtype or list(DTYPES)
    peaks = ", ".join(f"{kind} {ceilings.peak(DTYPES[kind]) / 1e9:,.0f} GFLOP/s" for kind in kinds)
    found = [measure(name, kind, bandwidth, rounds) for name in shape or SHAPES for kind in kinds]
    about = (
        f"Rank {RANK}. Products of {ceilings.PEAK_SIZE} x {ceilings.PEAK_SIZE}: {peaks}; copies: "
        f"{bandwidth / 1e9:.1f} GB/s, read and written. "
        "benchmarks/roofline.py explains the columns."
    )
    tables = [
        report.Table("Ratio to the frozen step", "", RATIOS, [f.ratio_row() for f in found]),
        report.Table("Parts", "", PARTS, [row for f in found for row in f.part_rows()]),
    ]
    stem = "_".join(["roofline", *(shape or []), *(dtype or [])])
    report.write(stem, "Lower bound and measured cost of a step", about, tables)


if __name__ == "__main__":
    typer.run(main)
