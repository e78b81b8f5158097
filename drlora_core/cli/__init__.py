"""The console script ``drlora``."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run ``drlora``; exit with 0, with 2 after a user error, with 1 after an internal error."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        sys.stderr.write(f'drlora: {error.name} is missing: pip install "drlora[cli]"\n')
        raise SystemExit(2) from None
    from drlora_core.cli.app import run

    run(arguments)
