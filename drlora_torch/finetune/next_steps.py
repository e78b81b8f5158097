"""The commands that follow a finished run."""

from __future__ import annotations

import shlex
from pathlib import Path

from drlora_torch.finetune.folder import RECORDING


def next_steps(output: Path) -> str:
    """Return what to do with a run: commands, and how Python loads its adapter."""
    run = shlex.quote(str(output))
    commands = {
        f'drlora generate {run} "PROMPT"': "text of the trained model",
        f"drlora evaluate {run} --base": "held-out loss beside that of the base model",
        f"drlora report {run}": "report.html: loss, ranks, checks",
        f"drlora merge {run}": "plain checkpoint of Transformers",
        f"drlora export {run}": "adapter of PEFT",
    }
    if not (output / RECORDING).exists():  # a run from the ranks of an adapter makes none
        del commands[f"drlora report {run}"]
    width = max(map(len, commands))
    lines = [f"  {command.ljust(width)}  # {what}" for command, what in commands.items()]
    python = f"  adapter = drlora_torch.load(model, {str(output)!r})  # in Python"
    return "\n".join(["Next:", *lines, python])
