"""``python -m benchmarks.scale``: train a model of full size for three steps, and weigh it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks import report
from benchmarks.scale.building import PRESETS
from benchmarks.scale.meter import available, return_large_blocks
from benchmarks.scale.page import put, section
from benchmarks.scale.running import Job, plan, run, warm_up
from drlora_core.cli.common import choose, format_bytes
from drlora_core.memory_forecast import RunOptions

RESERVE = 2**29
"""Bytes to leave for libraries and for what is not forecast."""


def main(
    model: Annotated[str, typer.Option(help=f"Of {', '.join(PRESETS)}.")] = "qwen3-30b-a3b",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Build only so many layers; writes no page.")
    ] = None,
    quantization: Annotated[
        Literal["none", "nf4", "fp4"] | None,
        typer.Option(help="How experts are stored; default: nf4 for qwen3-30b-a3b, else none."),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the LoRA.")] = "float32",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 128,
    blocks: Annotated[
        int,
        typer.Option(
            min=0, help="Freed blocks of so many MiB go back at once; 0: as malloc will have it."
        ),
    ] = 1,
    page: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/scale.md.")] = None,
) -> None:
    """Train, measure, print and write a section of the page."""
    preset = PRESETS[choose("model", model, PRESETS)]
    options = RunOptions(
        lora_dtype=dtype,
        quantization=quantization or preset.quantization,  # type: ignore[arg-type]
        kernel="ragged",
        tokens=tokens,
    )
    job = Job(preset, layers, options)
    needed = plan(job)[0].total
    typer.echo(f"forecast: {format_bytes(needed)}; free: {format_bytes(available())}", err=True)
    if needed + RESERVE > available():
        typer.echo("too little memory; --layers K builds a part of the model", err=True)
        raise typer.Exit(2)
    returned = blocks > 0 and return_large_blocks(blocks)
    warm_up(job)
    result = run(job)
    experts = options.base_dtype if options.quantization == "none" else options.quantization
    heading = f"{model}, {experts}, LoRA {dtype}"
    if layers is not None:
        heading += f", {layers} of {preset.fields['num_hidden_layers']} layers"
    text = section(heading, result, blocks if returned else 0)
    typer.echo(text)
    if layers is None or page is not None:
        put(page or report.RESULTS / "scale.md", heading, text)
    raise typer.Exit(0 if result.same_logits else 1)


if __name__ == "__main__":
    typer.run(main)
