"""``drlora merge``: the merged model of a run, as a checkpoint of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from drlora_torch.errors import RunError
from drlora_torch.finetune import folder


def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a run of drlora finetune.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write to. [default: merged in the folder of the run]"),
    ] = None,
    quantize: Annotated[
        bool,
        typer.Option("--quantize", help="Pack experts of 4 bits again; loading then needs drlora."),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare/--no-compare",
            help="Run the written model beside the trained one on a few tokens, before it counts.",
        ),
    ] = True,
) -> None:
    """Write the merged model of a run with its tokenizer, as a plain Transformers checkpoint.

    vLLM, SGLang, transformers serve and AutoModelForCausalLM load it without drlora. The run
    stays as it is. The adapter of an unfinished run is that of its last checkpoint.
    """
    from drlora_torch.finetune.after.found import read_options, target_of
    from drlora_torch.finetune.after.merged import describe, write_merged
    from drlora_torch.finetune.after.opened import open_run
    from drlora_torch.finetune.watch.progress import quiet_libraries

    options, target = read_options(run), target_of(run, output, folder.MERGED)
    if quantize and options.quantization == "none" and not options.load_in_4bit:
        raise RunError(
            "--quantize packs experts again, and this run did not pack them: leave it out"
        )
    with quiet_libraries():
        console = Console(stderr=True)
        with console.status("loading the model"):
            opened = open_run(run)
        with console.status("writing the merged model"):
            report = write_merged(opened, target, quantize=quantize, compare=compare)
    typer.echo(describe(report, quantize))
