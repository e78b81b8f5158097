"""The application: its commands, those of other packages, and how errors are shown.

Another distribution adds commands with an entry point of the group ``drlora.commands`` that loads
to a function ``register(app: typer.Typer) -> None``. Errors of its commands are shown like ours.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable

import typer
from pydantic import ValidationError

from drlora_core.cli.plan import plan
from drlora_core.cli.replay import replay_command
from drlora_core.cli.report import report
from drlora_core.errors import DRLoRAError, describe_validation_error
from drlora_core.replay import CAVEAT

ENTRY_POINTS = "drlora.commands"
# Libraries that a command may find missing; the extra ``finetune`` brings them.
FINETUNE = {"torch", "transformers", "safetensors", "accelerate", "datasets", "trl"}
USER_ERRORS = (DRLoRAError, ValidationError, OSError)


def describe_error(error: Exception) -> str:
    if isinstance(error, ValidationError):
        text = describe_validation_error(error)
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.strerror}: {error.filename}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def build() -> tuple[typer.Typer, list[str]]:
    """Return the application with all commands that can be loaded, and why others cannot."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.command()(plan)
    app.command("replay", epilog=CAVEAT)(replay_command)
    app.command()(report)
    missing = _register_others(app)
    text = "Rank allocation for LoRA fine-tuning of mixture-of-experts models."
    if missing:
        text += "\n\nNot available here: " + "; ".join(missing) + "."
    app.callback(help=text)(lambda: None)
    return app, missing


def _register_others(app: typer.Typer) -> list[str]:
    """Add the commands of other distributions; return why some cannot be added."""
    missing = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        theirs = typer.Typer()
        try:
            entry.load()(theirs)
            typer.main.get_command(theirs)  # reads their signatures, which may fail too
        except Exception as error:  # our own commands must work whatever fails there
            reason = f"{type(error).__name__}: {describe_error(error)}"
            if isinstance(error, ModuleNotFoundError):
                reason = f"the missing library {error.name}"
            hint = f' (pip install "drlora[{entry.name}]")' if entry.name == "torch" else ""
            module = entry.value.split(":")[0]
            missing.append(f"the commands of {module}, because of {reason}{hint}")
        else:
            app.registered_commands += theirs.registered_commands
            app.registered_groups += theirs.registered_groups
    return missing


def print_error(text: str) -> None:
    typer.echo(f"drlora: {text}", err=True)


def run(arguments: list[str] | None, show: Callable[[str], None] = print_error) -> None:
    """Run the application; show an error in one line; always end in SystemExit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    app, missing = build()
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is not None and command not in typer.main.get_group(app).commands:
        for reason in missing:
            print_error(f"not available here: {reason}")
    try:
        app(args=arguments, prog_name="drlora")
    except Exception as error:
        text, code = describe_error(error), 2
        if isinstance(error, ModuleNotFoundError) and error.name in FINETUNE:
            install = 'pip install -c constraints.txt "drlora[finetune]"'
            text = f"{command} needs {error.name}, which is not installed: {install}"
        elif os.environ.get("DRLORA_DEBUG"):
            raise
        elif not isinstance(error, USER_ERRORS):
            text = f"internal error: {type(error).__name__}: {text}"
            text, code = f"{text} (DRLORA_DEBUG=1 shows the traceback)", 1
        show(text)
        raise SystemExit(code) from None
