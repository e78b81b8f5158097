"""``drlora push``: what a run has trained, on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def push(
    run: Annotated[Path, typer.Argument(help="Folder of a run of drlora finetune.")],
    repo_id: Annotated[
        str, typer.Argument(help="Repository, OWNER/NAME; it is made if there is none.")
    ],
    what: Annotated[
        Literal["adapter", "peft", "merged"],
        typer.Option(
            help="The adapter with its ranks, which drlora_torch.load takes; what drlora export "
            "wrote (peft); or what drlora merge wrote (merged)."
        ),
    ] = "adapter",
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
) -> None:
    """Upload what a run has trained to the Hugging Face hub, with a model card.

    Log in with hf auth login first. No model is loaded. A README.md that you wrote stays
    the card. The adapter of an unfinished run is that of its last checkpoint.
    """
    from drlora_torch.finetune.after.pushing import push_run

    repo = push_run(run, repo_id, what, private=True if private else None)
    typer.echo(f"https://huggingface.co/{repo}")
