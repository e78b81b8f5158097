"""Profile of a step, by operator.

python -m benchmarks.profile_step --method "drlora, static" --shape small
"""

from __future__ import annotations

from typing import Annotated

import typer
from torch.profiler import profile

from benchmarks.blocks import DTYPES, SHAPES, Case
from benchmarks.methods import METHODS, STATIC
from benchmarks.options import DtypeName, ShapeName


def main(
    method: Annotated[str, typer.Option(help=f"One of: {'; '.join(METHODS)}.")] = STATIC,
    shape: ShapeName = "small",
    dtype: DtypeName = "float32",
    steps: Annotated[int, typer.Option(help="Steps to profile.")] = 3,
    rows: Annotated[int, typer.Option(help="Operators to list.")] = 20,
) -> None:
    """Print the operators with the largest self time."""
    step = METHODS[method](Case(SHAPES[shape], DTYPES[dtype]))
    step()
    step()
    with profile() as profiler:
        for _ in range(steps):
            step()
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows)
    typer.echo(table)


if __name__ == "__main__":
    typer.run(main)
