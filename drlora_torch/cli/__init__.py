"""Commands that need torch, found by the entry point ``drlora.commands``.

Heavy libraries are imported when a command runs, so that ``drlora --help`` stays fast.
"""

from __future__ import annotations

import typer

from drlora_torch.cli.export import export
from drlora_torch.cli.finetune import finetune
from drlora_torch.cli.inspect import inspect


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of the core."""
    for command in (finetune, inspect, export):
        app.command()(command)
