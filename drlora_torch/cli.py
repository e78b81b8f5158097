"""Commands that need torch: ``drlora finetune``, ``drlora inspect`` and ``drlora export``.

The core's command line loads them through the entry point group ``drlora.commands``. Heavy
libraries are imported when a command runs, so that ``drlora --help`` stays fast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from drlora_torch.errors import RunError
from drlora_torch.finetune.options import FinetuneOptions, embedded_defaults
from drlora_torch.finetune.signature import add_finetune_options

Compare = Literal["uniform"] | None


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of the core."""
    app.command()(finetune)
    app.command()(inspect)
    app.command()(export)


@add_finetune_options
def finetune(
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the run, which must not exist. [default: runs/TIME]"),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue the run in this folder, with the options saved there."),
    ] = None,
    compare: Annotated[
        Compare,
        typer.Option(help="Also train static LoRA with the same budget."),
    ] = None,
    **options: Any,
) -> None:
    """Fine-tune a mixture-of-experts model; without arguments, the small one that is shipped."""
    # A flag that is not given is None or False, depending on the version of click.
    chosen = {n: v for n, v in options.items() if v is not None and v is not False}
    if resume is not None:
        _continue(resume, chosen | {"output": output, "compare": compare})
        return
    if "model" in chosen and "data" not in chosen:
        raise RunError("a MODEL needs DATA: drlora finetune MODEL DATA --output DIR")
    shipped = {} if "model" in chosen else embedded_defaults()
    _run(FinetuneOptions.model_validate({**shipped, **chosen}), output, compare)


def _continue(folder: Path, chosen: dict[str, Any]) -> None:
    from drlora_torch.finetune import folder as folders

    if given := sorted(name for name, value in chosen.items() if value is not None):
        raise RunError(f"--resume uses the options of the run; leave out {', '.join(given)}")
    saved = folders.read_unfinished(folder)
    _run(saved.options, folder, saved.compare, resume=True)


def _run(
    options: FinetuneOptions, output: Path | None, compare: Compare, *, resume: bool = False
) -> None:
    from rich.console import Console

    from drlora_torch.finetune import folder, job

    job.run(options, output or folder.default_folder(), Console(), compare=compare, resume=resume)


def inspect(
    model: Annotated[str, typer.Argument(help="Hugging Face id or local folder of a model.")],
    rank: Annotated[
        int, typer.Option(min=1, help="Mean rank for which the size of the LoRA is shown.")
    ] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the mixture-of-experts layers of a model, their convention and the size of the LoRA."""
    from rich.console import Console

    from drlora_torch import inspection
    from drlora_torch.finetune.model import load_model

    loaded = load_model(model)
    if as_json:
        typer.echo(json.dumps(inspection.inspect(loaded, rank), indent=2))
    else:
        inspection.show(model, loaded, rank, Console())


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
    from drlora_torch.finetune.export_run import export_run

    report = export_run(run, output, rank=rank, per_expert=per_expert)
    typer.echo(f"{report.path}: rank {max(report.ranks.values())}")
    if rank is not None:
        typer.echo(f"largest relative error of an expert: {report.largest_error:.2e}")
