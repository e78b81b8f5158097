"""Commands that need torch: ``drlora finetune``, ``drlora inspect`` and ``drlora export``.

Registered with the core's command line through the entry point group ``drlora.commands``. Heavy
libraries are imported when a command runs, so that ``drlora --help`` stays fast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from drlora_torch.finetune import arguments as given

NOT_OPTIONS = ("output", "resume", "compare")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of the core."""
    app.command()(finetune)
    app.command()(inspect)
    app.command()(export)


def finetune(
    model: given.Model = None,
    data: given.Data = None,
    output: given.Output = None,
    resume: given.Resume = None,
    compare: given.Compare = None,
    eval_data: given.EvalData = None,
    eval_fraction: given.EvalFraction = None,
    steps: given.Steps = None,
    batch_size: given.BatchSize = None,
    accumulation: given.Accumulation = None,
    learning_rate: given.LearningRate = None,
    max_length: given.MaxLength = None,
    seed: given.Seed = None,
    dtype: given.Dtype = None,
    r_init: given.RInit = None,
    r_target: given.RTarget = None,
    r_max: given.RMax = None,
    alpha: given.Alpha = None,
    gamma: given.Gamma = None,
    timetable: given.Timetable = None,
    warmup_steps: given.WarmupSteps = None,
    growth_interval: given.GrowthInterval = None,
    growth_end: given.GrowthEnd = None,
    max_growth: given.MaxGrowth = None,
    policy: given.Policy = None,
    scope: given.Scope = None,
    router: given.Router = None,
    layout: given.SlotLayout = None,
    dropout: given.Dropout = None,
    gradient_checkpointing: given.GradientCheckpointing = False,
    save_every: given.SaveEvery = None,
) -> None:
    """Fine-tune a mixture-of-experts model; without arguments, the small one that is shipped."""
    options = {name: value for name, value in locals().items() if name not in NOT_OPTIONS}
    chosen = {n: value for n, value in options.items() if value is not None and value is not False}
    if resume is None:
        _start(chosen, output, compare)
    else:
        _go_on(resume, {**chosen, **({"output": output} if output else {})})


def _start(chosen: dict[str, Any], output: Path | None, compare: str | None) -> None:
    from rich.console import Console

    from drlora_torch.errors import RunError
    from drlora_torch.finetune import folder
    from drlora_torch.finetune.job import run
    from drlora_torch.finetune.options import FinetuneOptions, embedded_defaults

    if "model" in chosen and "data" not in chosen:
        raise RunError("a MODEL needs DATA: drlora finetune MODEL DATA --output DIR")
    if "model" not in chosen:
        chosen = {**embedded_defaults(), **chosen}
    options = FinetuneOptions.model_validate(chosen)
    run(options, output or folder.default_folder(), Console(), compare=compare)


def _go_on(resume: Path, chosen: dict[str, Any]) -> None:
    from rich.console import Console

    from drlora_torch.errors import RunError
    from drlora_torch.finetune import folder
    from drlora_torch.finetune.job import run

    if chosen:
        raise RunError(
            f"--resume takes every option from the run; leave out {', '.join(sorted(chosen))}"
        )
    options, compare = folder.read_options(resume)
    run(options, resume, Console(), compare=compare, resume=True)


def inspect(
    model: Annotated[str, typer.Argument(help="Hugging Face id or local folder of a model.")],
    rank: Annotated[int, typer.Option(min=1, help="Mean rank whose LoRA size is shown.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the mixture-of-experts layers of a model, what adapts them, and the size of the LoRA."""
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
        Optional[Path],  # noqa: UP045 - typer reads it at run time, on Python 3.10 too
        typer.Option(help="Where to write (default: peft in the folder of the run)."),
    ] = None,
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Compress every expert to this rank."),
    ] = None,
    per_expert: Annotated[
        bool, typer.Option("--per-expert", help="One LoRA per expert and projection.")
    ] = False,
) -> None:
    """Write the adapter of a run as a PEFT directory, for PEFT and what reads its format."""
    from drlora_torch.finetune.export_run import export_run

    report = export_run(run, output, rank=rank, per_expert=per_expert)
    typer.echo(f"{report.path}: rank {max(report.ranks.values())}")
    if rank is not None:
        typer.echo(f"largest relative error of an expert: {report.largest_error:.2e}")
