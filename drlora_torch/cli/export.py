"""``drlora export``: the adapter of a run as a PEFT directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drlora_torch.finetune import folder


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run of drlora finetune.")],
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
    """Write the adapter of a run as a PEFT directory."""
    from drlora_torch.finetune.after.found import target_of
    from drlora_torch.finetune.after.opened import open_run
    from drlora_torch.finetune.watch.progress import quiet_libraries

    target = target_of(run, output, folder.PEFT)
    with quiet_libraries():
        adapter = open_run(run).adapter
    report = adapter.export_peft(target, rank=rank, per_expert=per_expert)
    typer.echo(f"{report.path}: rank {max(report.ranks.values())}")
    if rank is not None:
        typer.echo(f"largest relative error of an expert: {report.largest_error:.2e}")
