"""``drlora inspect``: the mixture-of-experts layers of a model."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console

from drlora_core.cli.common import AsJson, emit


def inspect(
    model: Annotated[str, typer.Argument(help="Hugging Face id or local folder of a model.")],
    rank: Annotated[
        int, typer.Option(min=1, help="Mean rank for which the size of the LoRA is shown.")
    ] = 16,
    quantization: Annotated[
        Literal["none", "nf4", "fp4", "fp8", "mxfp4"],
        typer.Option(help="How the experts are stored, as in drlora finetune."),
    ] = "none",
    as_json: AsJson = False,
) -> None:
    """List the mixture-of-experts layers of a model, their storage and the size of the LoRA."""
    from drlora_torch import inspection
    from drlora_torch.finetune.model import load_model

    loaded = load_model(model, quantization=quantization)
    if as_json:
        emit(inspection.inspect(loaded, rank))
    else:
        inspection.show(model, loaded, rank, Console())
