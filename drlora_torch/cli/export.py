"""``drlora export``: the adapter of a run as a PEFT directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from drlora_core.cli.app import print_error
from drlora_core.cli.console import say
from drlora_torch.finetune import folder

LARGE_ERROR = 0.1
Errors = Mapping[str, Mapping[str, NDArray[np.float64]]]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of drlora finetune.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write to. [default: peft in the folder of the run]"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress every expert to this rank.")
    ] = None,
    per_expert: Annotated[
        bool, typer.Option("--per-expert", help="Write one LoRA per expert and projection.")
    ] = False,
) -> None:
    """Write the adapter of a run for PEFT.

    Without --rank the export is exact.
    """
    from drlora_torch.finetune.after.found import target_of
    from drlora_torch.finetune.after.opened import open_run
    from drlora_torch.finetune.watch.progress import quiet_libraries

    target = target_of(run, output, folder.PEFT)
    with quiet_libraries():
        adapter = open_run(run).adapter
    report = adapter.export_peft(target, rank=rank, per_expert=per_expert)
    say(f"{report.path}: rank {max(report.ranks.values())}")
    if rank is not None:
        say(f"largest relative error of an expert: {report.largest_error:.2e}")
        largest = max(int(ranks.max()) for ranks in adapter.ranks().values())
        if (warning := describe_loss(report.errors, largest)) is not None:
            print_error(f"warning: {warning}")


def describe_loss(errors: Errors, largest: int) -> str | None:
    """Name the expert that a compression changed most; None if it is changed by 10 % or less.

    Args:
        errors: relative errors by layer, projection and expert.
        largest: rank at which nothing is lost.
    """
    error, layer, projection, expert = max(
        (float(each.max()), layer, projection, int(each.argmax()))
        for layer, by_projection in errors.items()
        for projection, each in by_projection.items()
    )
    if error <= LARGE_ERROR:
        return None
    return (
        f"{projection} of expert {expert} in layer {layer!r} has a relative error of "
        f"{100 * error:.0f} %; use a higher --rank (at {largest} nothing is lost)"
    )
