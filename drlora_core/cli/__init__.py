"""The console script ``drlora``."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run ``drlora``; exit with 0, with 2 after a user error, with 1 after an internal error.

    A signal that ends it gives 128 and its number.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        sys.stderr.write(f'drlora: {error.name} is missing: pip install "drlora[cli]"\n')
        raise SystemExit(2) from None
    from drlora_core.cli.app import INTERRUPTED, print_error, run
    from drlora_core.cli.signals import Terminated, raising_terminated

    try:
        with raising_terminated():
            run(arguments)
    except Terminated as stopped:
        text, code = str(stopped), stopped.exit_code
    except KeyboardInterrupt:
        text, code = "interrupted", INTERRUPTED
    else:
        return
    print_error(text)
    raise SystemExit(code)
