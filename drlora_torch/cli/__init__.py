"""Commands that need torch, found by the entry point ``drlora.commands``.

Heavy libraries are imported when a command runs, so that ``drlora --help`` stays fast.
"""

from __future__ import annotations

import logging

import typer

from drlora_torch.cli.evaluate import evaluate
from drlora_torch.cli.export import export
from drlora_torch.cli.finetune import finetune
from drlora_torch.cli.generate import generate
from drlora_torch.cli.inspect import inspect
from drlora_torch.cli.merge import merge
from drlora_torch.cli.push import push

NOISY = ("bitsandbytes", "torchao")
"""PEFT imports them, used or not, and they warn of kernels that are not installed."""


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of the core."""
    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    for command in (finetune, inspect, generate, evaluate, merge, export, push):
        app.command()(command)
