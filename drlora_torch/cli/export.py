"""``drlora export``: the adapter of a run as a PEFT directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drlora_torch.errors import RunError
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
    from drlora_torch.api import load
    from drlora_torch.finetune.model import load_base
    from drlora_torch.integrations.trainer import last_checkpoint

    options = folder.read(run).options
    final = run / folder.ADAPTER
    source = final if final.is_dir() else last_checkpoint(run / folder.CHECKPOINTS)
    if source is None:
        raise RunError(f"the run in {str(run)!r} has saved no adapter yet")
    target = output or run / folder.PEFT
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{str(target)!r} exists; use another --output")
    adapter = load(load_base(options), source)
    report = adapter.export_peft(target, rank=rank, per_expert=per_expert)
    typer.echo(f"{report.path}: rank {max(report.ranks.values())}")
    if rank is not None:
        typer.echo(f"largest relative error of an expert: {report.largest_error:.2e}")
