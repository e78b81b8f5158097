"""The application: its commands, those of other packages, and how errors are shown.

Another distribution adds commands with an entry point of the group ``drlora.commands`` that loads
to a function ``register(app: typer.Typer) -> None``. Errors of its commands are shown like ours.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from pydantic import ValidationError
from typer.core import TyperCommand

from drlora_core.cli.console import soften_output
from drlora_core.cli.plan import plan
from drlora_core.cli.replay import replay_command
from drlora_core.cli.report import report
from drlora_core.cli.sections import SectionedCommand
from drlora_core.cli.usage import describe_usage_error
from drlora_core.errors import DRLoRAError, describe_validation_error, printable
from drlora_core.replay import CAVEAT

ENTRY_POINTS = "drlora.commands"
# Libraries that a command may find missing, and the extra that brings them.
FINETUNE = "torch transformers safetensors accelerate datasets trl psutil peft yaml pyarrow pandas"
EXTRAS = dict.fromkeys(FINETUNE.split(), "finetune") | {"bitsandbytes": "quantized"}
VERSIONS = ("drlora", "numpy", "torch", "transformers")
USER_ERRORS = (DRLoRAError, ValidationError, OSError)
# Its module is another one in typer 0.19, which uses click, than in versions with a copy of it.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


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
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # see `SectionedCommand`
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.command()(plan)
    app.command("replay", epilog=CAVEAT)(replay_command)
    app.command()(report)
    missing = _register_others(app)
    for command in app.registered_commands:
        if command.cls is TyperCommand:
            command.cls = SectionedCommand
    text = "Rank allocation for LoRA fine-tuning of mixture-of-experts models."
    if missing:
        text += "\n\nNot available here: " + "; ".join(missing) + "."
    app.callback(help=text)(_root)
    return app, missing


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=lambda given: _show_versions() if given else None,
            help="Show the versions of drlora and of the libraries that it uses.",
        ),
    ] = False,
) -> None:
    pass


def _show_versions() -> None:
    """Print the versions of drlora, Python and what is installed beside them; import nothing."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    for name in ("drlora", "python", *VERSIONS[1:]):
        typer.echo(f"{name} {found[name]}")
    raise typer.Exit


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
            extra = EXTRAS.get(getattr(error, "name", ""), "finetune")
            hint = f' (pip install "drlora[{extra}]")' if entry.name == "torch" else ""
            module = entry.value.split(":")[0]
            missing.append(f"the commands of {module}, because of {reason}{hint}")
        else:
            app.registered_commands += theirs.registered_commands
            app.registered_groups += theirs.registered_groups
    return missing


def print_error(text: str) -> None:
    """Print a sentence to standard error."""
    print(f"drlora: {text}", file=sys.stderr)


def run(arguments: list[str] | None, show: Callable[[str], None] = print_error) -> None:
    """Run the application; show an error in one line; always end in SystemExit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    soften_output()
    app, missing = build()
    try:
        code = app(args=arguments or ["--help"], prog_name="drlora", standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise typer.Abort
    except typer.Abort:
        text, code = "interrupted", INTERRUPTED
    except USAGE_ERROR as error:
        text, code = describe_usage_error(error, arguments, missing), 2
    except Exception as error:
        command = next((word for word in arguments if not word.startswith("-")), "drlora")
        text, code = _describe_failure(error, command)
    else:  # an exit code where a command ended early
        raise SystemExit(code if isinstance(code, int) else 0)
    show(printable(text))
    raise SystemExit(code) from None


def _describe_failure(error: Exception, command: str) -> tuple[str, int]:
    """Return the sentence and the exit code; raise the error if the user wants the traceback."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        install = f'pip install -c constraints.txt "drlora[{EXTRAS[error.name]}]"'
        return f"{command} needs {error.name}, which is not installed: {install}", 2
    if os.environ.get("DRLORA_DEBUG"):
        raise error
    text = describe_error(error)
    if isinstance(error, USER_ERRORS):
        return text, getattr(error, "exit_code", 2)
    text = f"internal error: {type(error).__name__}: {text}"
    return f"{text} (DRLORA_DEBUG=1 shows the traceback)", 1
