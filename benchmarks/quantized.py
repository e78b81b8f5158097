"""Cost of a packed base: time of a step, memory of the experts, and what 4 bits do to a fine-tune.

    python -m benchmarks.quantized                  # olmoe and small, float32 and bfloat16
    python -m benchmarks.quantized --what finetune

Times are ratios within interleaved rounds (benchmarks/rounds.py).
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

import drlora_torch
from benchmarks import methods, report, rounds
from benchmarks.blocks import DTYPES, SHAPES, Case
from benchmarks.methods import RANK
from benchmarks.options import Dtypes, Rounds, Shapes
from drlora_torch.finetune import job
from drlora_torch.finetune.recipe import combine

STORAGES = ("nf4", "fp4")
DENSE = "drlora on unpacked experts"
PACKED = "drlora on {}"
FORWARD = "frozen, {}"
SEEDS = (0, 1, 2)
LIMIT_TIME, LIMIT_MEMORY = 1.6, 0.29
ABOUT = (
    f"Rank {RANK}, growing. Frozen: forward, and backward to the inputs, with the faster of the "
    "grouped_mm and eager experts of Transformers. drlora includes statistics, growth and AdamW. "
    "Ratios: median (quartiles) over interleaved rounds. Goals on CPUs: a step on nf4 takes at "
    f"most {LIMIT_TIME} x the frozen float32 model; experts take at most {LIMIT_MEMORY} x bfloat16."
)


def measure(case: Case, count: int | None) -> list[list[str]]:
    """Rows of the table of times."""
    builders = {
        methods.FROZEN: methods.frozen("grouped_mm"),
        methods.EAGER: methods.frozen("eager"),
        DENSE: methods.drlora(r_max=2 * RANK, growing=True),
    }
    for storage in STORAGES:
        pack = functools.partial(drlora_torch.quantize_experts, quant_type=storage)
        builders[FORWARD.format(storage)] = methods.frozen("eager", pack)
        builders[PACKED.format(storage)] = methods.drlora(
            r_max=2 * RANK, growing=True, prepare=pack
        )
    timings = rounds.interleave({name: build(case) for name, build in builders.items()}, count)
    best = timings.faster(methods.FROZEN, methods.EAGER)
    return [
        [name, f"{timings.median(name):.4f}", str(timings.ratio(name, best)),
         str(timings.ratio(name, DENSE))]
        for name in timings.seconds
    ]  # fmt: skip


def memory(case: Case) -> list[list[str]]:
    """Bytes of the experts, over those of bfloat16."""
    model = case.blocks()
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    rows = []
    for storage in STORAGES:
        for double in (True, False):
            model = case.blocks()
            taken = drlora_torch.quantize_experts(model, quant_type=storage, double_quant=double)
            name = storage + ("" if double else ", scales in float32")
            rows.append([name, f"{taken.after / weights:.4f}", f"{taken.after / 2 / weights:.4f}"])
    return rows


def finetune() -> list[list[str]]:
    """Held-out losses of ``drlora finetune`` on the shipped model, by storage."""
    rows = []
    for storage in ("none", "nf4"):
        losses = []
        for seed in SEEDS:
            recipe = combine({"quantization": storage, "seed": seed})
            with tempfile.TemporaryDirectory() as folder:
                (result,) = job.run(recipe, Path(folder) / "run", Console(quiet=True))
            losses.append((result.loss_before, result.loss_after))
        before, after = (
            torch.tensor(column, dtype=torch.float64) for column in zip(*losses, strict=True)
        )
        rows.append(
            ["float32" if storage == "none" else storage, f"{before.mean():.4f}",
             ", ".join(f"{value:.4f}" for value in after), f"{after.mean():.4f}",
             f"{after.std():.4f}"]
        )  # fmt: skip
    return rows


def main(
    shape: Shapes = None,
    dtype: Dtypes = None,
    rounds: Rounds = None,
    what: Annotated[
        Literal["steps", "finetune"], typer.Option(help="Steps of blocks, or whole fine-tunes.")
    ] = "steps",
) -> None:
    """Measure, print and write the tables."""
    if what == "finetune":
        columns = ["experts", "loss before", "losses after, by seed", "mean", "deviation"]
        about = f"Held-out loss in nats, seeds {SEEDS}; deviation: of the seeds, as a standard one."
        heading = "Fine-tuning the shipped model on packed experts"
        table = report.Table("", about, columns, finetune())
        report.write("quantized_finetune", heading, "`drlora finetune` as it is.", [table])
        return
    tables = []
    for name in shape or ("olmoe", "small"):
        for kind in dtype or DTYPES:
            case = Case(SHAPES[name], DTYPES[kind])
            columns = ["method", "s / step", "/ frozen", "/ drlora on unpacked experts"]
            about = f"{SHAPES[name]}"
            tables.append(report.Table(f"{name}, {kind}", about, columns, measure(case, rounds)))
    case = Case(SHAPES[(shape or ["olmoe"])[0]], torch.bfloat16)
    columns = ["storage", "bytes a weight", "/ bfloat16"]
    tables.append(report.Table("Memory of the experts", "", columns, memory(case)))
    report.write("quantized_steps", "Cost of packed experts", ABOUT, tables)


if __name__ == "__main__":
    typer.run(main)
