"""``drlora inspect``: the mixture-of-experts layers of a model."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from drlora_core.cli.common import AsJson, emit
from drlora_core.cli.console import make_console


def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hugging Face id, local folder or config.json."),
    ],
    rank: Annotated[
        int, typer.Option(min=1, help="Mean rank for which the size of the LoRA is shown.")
    ] = 16,
    quantization: Annotated[
        Literal["none", "nf4", "fp4", "fp8", "mxfp4"],
        typer.Option(help="How the experts are stored, as in drlora finetune."),
    ] = "none",
    as_json: AsJson = False,
) -> None:
    """List a model's MoE layers and their size.

    No weights are loaded: the model is built from its configuration, in the data type that this
    names, and takes no memory.
    """
    from drlora_torch import inspection
    from drlora_torch.models.shapes import build_skeleton

    built = build_skeleton(model, quantization)
    if as_json:
        emit(inspection.inspect(built, rank))
    else:
        inspection.show(model, built, rank, make_console())
