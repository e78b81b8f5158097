"""Commands that need torch: ``drlora finetune`` and ``drlora inspect``.

Registered with the core's command line through the entry point group ``drlora.commands``. Heavy
libraries are imported when a command runs, so that ``drlora --help`` stays fast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

COMPARE = Literal["uniform"]
Text = Optional[str]  # noqa: UP045 - typer reads these at run time on Python 3.10
Whole = Optional[int]  # noqa: UP045
Real = Optional[float]  # noqa: UP045
Folder = Optional[Path]  # noqa: UP045


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of the core."""
    app.command()(finetune)
    app.command()(inspect)


def finetune(
    model: Annotated[
        Text, typer.Argument(help="Hugging Face id or local folder of a MoE model.")
    ] = None,
    data: Annotated[
        Text,
        typer.Argument(
            help="A .jsonl or .txt file, or a dataset id, with columns text, prompt and "
            "completion, or messages."
        ),
    ] = None,
    output: Annotated[
        Folder, typer.Option(help="Folder for the run; must not exist. [default: runs/<time>]")
    ] = None,
    eval_data: Annotated[Text, typer.Option(help="Held-out rows; like DATA.")] = None,
    eval_fraction: Annotated[
        Real, typer.Option(help="Share of DATA to hold out without --eval-data.")
    ] = None,
    steps: Annotated[Whole, typer.Option(help="Optimizer steps. [default: 200]")] = None,
    batch_size: Annotated[Whole, typer.Option(help="Rows per step and device.")] = None,
    accumulation: Annotated[Whole, typer.Option(help="Micro-batches per optimizer step.")] = None,
    learning_rate: Annotated[Real, typer.Option(help="Peak rate of AdamW.")] = None,
    max_length: Annotated[Whole, typer.Option(help="Longest row in tokens.")] = None,
    seed: Annotated[Whole, typer.Option(help="Seed of data order, A and policy.")] = None,
    dtype: Annotated[
        Text, typer.Option(help="auto, float32, bfloat16 or float16, of the base model.")
    ] = None,
    r_init: Annotated[Whole, typer.Option(help="Rank of every expert at the start.")] = None,
    r_target: Annotated[Whole, typer.Option(help="Mean rank at the end (the budget).")] = None,
    r_max: Annotated[Whole, typer.Option(help="Largest rank of one expert.")] = None,
    alpha: Annotated[Real, typer.Option(help="Scaling is alpha / r_target.")] = None,
    gamma: Annotated[Real, typer.Option(help="Exponent of the rank penalty.")] = None,
    warmup_steps: Annotated[
        Whole, typer.Option(help="Steps before growth. [default: 10 % of steps]")
    ] = None,
    growth_interval: Annotated[
        Whole, typer.Option(help="Steps between events. [default: for 8 events]")
    ] = None,
    growth_end: Annotated[
        Whole, typer.Option(help="Last step of growth. [default: 60 % of steps]")
    ] = None,
    max_growth: Annotated[Whole, typer.Option(help="Most rank per expert and event.")] = None,
    policy: Annotated[
        Text,
        typer.Option(help="greedy, rescored, proportional, random, uniform or prune."),
    ] = None,
    scope: Annotated[Text, typer.Option(help="layer or global.")] = None,
    router: Annotated[Text, typer.Option(help="frozen, after_warmup or trainable.")] = None,
    layout: Annotated[Text, typer.Option(help="pooled or masked.")] = None,
    dropout: Annotated[Real, typer.Option(help="LoRA dropout.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Trade time for memory.")
    ] = False,
    save_every: Annotated[
        Whole, typer.Option(help="Steps between checkpoints. [default: a quarter]")
    ] = None,
    compare: Annotated[
        Optional[COMPARE],  # noqa: UP045
        typer.Option(help="Train static LoRA at the same budget too."),
    ] = None,
    resume: Annotated[
        Folder, typer.Option(help="Go on with the run in this folder; its options are used.")
    ] = None,
) -> None:
    """Fine-tune a mixture-of-experts model; without arguments, the small one that is shipped."""
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("output", "compare", "resume"):
        given.pop(name, None)
    _finetune(given, output, compare, resume)


def _finetune(
    given: dict[str, Any], output: Path | None, compare: str | None, resume: Path | None
) -> None:
    from rich.console import Console

    from drlora_torch.errors import RunError
    from drlora_torch.finetune import folder
    from drlora_torch.finetune.job import run
    from drlora_torch.finetune.options import FinetuneOptions, embedded_defaults

    console = Console()
    if resume is not None:
        given.pop("gradient_checkpointing")
        if given or output is not None or compare is not None:
            raise RunError("--resume takes every option from the run; give no other")
        options, compare = folder.read_options(resume)
        run(options, resume, console, compare=compare, resume=True)
        return
    if "model" not in given:
        given = {**embedded_defaults(), **given}
    elif "data" not in given:
        raise RunError("a MODEL needs DATA: drlora finetune MODEL DATA --output DIR")
    options = FinetuneOptions.model_validate(given)
    run(options, output or folder.default_folder(), console, compare=compare)


def inspect(
    model: Annotated[str, typer.Argument(help="Hugging Face id or local folder of a model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the mixture-of-experts layers of a model and whether they can be adapted."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from drlora_torch.finetune.model import load_model
    from drlora_torch.models.discovery import discover

    layers = discover(load_model(model))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(layer) for layer in layers], indent=2))
        return
    table = Table(title=model)
    for column in ("layer", "experts", "projections (in x out)", "router", "dtype", "adaptable"):
        table.add_column(column)
    for layer in layers:
        table.add_row(
            layer.name,
            f"{layer.num_experts} {layer.experts_class}",
            ", ".join(
                f"{name} {shape.in_features} x {shape.out_features}"
                for name, shape in layer.projections.items()
            ),
            layer.router or "-",
            layer.dtype,
            layer.obstacle or "yes",
        )
    Console().print(table)
