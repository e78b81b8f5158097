"""The application: our commands, those of other packages, and what becomes of errors.

Another distribution adds commands with an entry point of the group ``drlora.commands`` that loads
to a function ``register(app: typer.Typer) -> None``. Errors of its commands are treated as ours.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from drlora_core.cli import plan, replay, report
from drlora_core.errors import DRLoRAError

ENTRY_POINTS = "drlora.commands"
# Libraries that a command may find missing, and the extra that brings them.
EXTRAS = {
    **dict.fromkeys(
        ("torch", "transformers", "safetensors", "accelerate", "datasets", "trl"), "finetune"
    ),
    "plotly": "report",
}
USER_ERRORS = (DRLoRAError, ValidationError, OSError)


class Group(TyperGroup):
    """A group of commands whose user errors are one sentence and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except ModuleNotFoundError as error:
            if (extra := EXTRAS.get(error.name or "")) is None:
                raise
            typer.echo(
                f"drlora: {ctx.invoked_subcommand} needs {error.name}, which is not installed: "
                f'pip install -c constraints.txt "drlora[{extra}]"',
                err=True,
            )
            raise typer.Exit(2) from None
        except USER_ERRORS as error:
            if os.environ.get("DRLORA_DEBUG"):
                raise
            typer.echo(f"drlora: {sentence(error)}", err=True)
            raise typer.Exit(2) from None


def sentence(error: Exception) -> str:
    """Say an error in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        text = f"{place}: {text}" if place else text
        if (more := error.error_count() - 1) > 0:
            text += f" (and {more} more)"
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.strerror}: {error.filename}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def build() -> typer.Typer:
    """Return the application with all commands that can be loaded."""
    app = typer.Typer(
        cls=Group,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    plan.register(app)
    replay.register(app)
    report.register(app)
    missing = _register_others(app)
    text = "Rank allocation for LoRA fine-tuning of mixture-of-experts models."
    if missing:
        text += "\n\nNot available here: " + "; ".join(missing) + "."

    @app.callback(help=text)
    def _root() -> None:
        """Hold the options that all commands share: none yet."""

    return app


def _register_others(app: typer.Typer) -> list[str]:
    """Let other distributions add commands; return why some could not."""
    missing = []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        theirs = typer.Typer()
        try:
            entry.load()(theirs)
            typer.main.get_command(theirs)  # reads their signatures, which may fail too
        except Exception as error:  # whatever is wrong there, our commands work
            hint = f' (pip install "drlora[{entry.name}]")' if entry.name == "torch" else ""
            reason = f"the commands of {entry.value.split(':')[0]}, because of {_reason(error)}"
            missing.append(reason + hint)
        else:
            app.registered_commands += theirs.registered_commands
            app.registered_groups += theirs.registered_groups
    return missing


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the missing library {error.name}"
    return f"{type(error).__name__}: {sentence(error)}"


def run(arguments: list[str] | None) -> None:
    """Run the application; always ends in SystemExit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    app = build()
    command = next((word for word in arguments if not word.startswith("-")), None)
    names = {
        entry.name or entry.callback.__name__ for entry in app.registered_commands if entry.callback
    }
    if command is not None and command not in names:
        for reason in _register_others(typer.Typer()):
            typer.echo(f"drlora: not available here: {reason}", err=True)
    try:
        app(args=arguments, prog_name="drlora")
    except Exception as error:
        if os.environ.get("DRLORA_DEBUG"):
            raise
        typer.echo(
            f"drlora: internal error: {type(error).__name__}: {sentence(error)} "
            f"(DRLORA_DEBUG=1 shows where)",
            err=True,
        )
        raise SystemExit(1) from None
