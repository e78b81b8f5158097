"""Measure the mutation score of the core: `python -m scripts.mutants --help`."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import pytest
import typer
from mutmut.configuration import config
from rich.console import Console

from scripts.mutants.generate import generate
from scripts.mutants.listed import Change, read_listed, say
from scripts.mutants.trials import KILLED, SURVIVED, TIMED_OUT, UNTESTED, Trials


def main(
    only: Annotated[str, typer.Argument(help="Of the modules, such as 'drlora_core.e*'.")] = "*",
    seconds: Annotated[float, typer.Option(help="Most seconds of tests for a mutant.")] = 60.0,
    listed: Annotated[bool, typer.Option(help="Run the tests on mutants of the list too.")] = False,
) -> None:
    """Change the code of the core in thousands of ways, and count the changes that tests notice.

    A mutant that no test notices has to be in survivors.toml, with the reason why none can. The
    exit status is 1 if one is not, or if one of the list is noticed.
    """
    known = read_listed()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        mutants = generate(copy, only)
        tried = [name for name, change in mutants.items() if listed or change not in known]
        ends = run_tests(copy, tried, mutants, seconds)
    unnoticed = [mutants[name] for name, end in ends.items() if end in (SURVIVED, UNTESTED)]
    errors = [say("not in the list", change) for change in unnoticed if change not in known]
    here = unnoticed if listed else mutants.values()
    errors += [
        say("listed, but noticed by a test or gone", change)
        for change in known
        if fnmatch(change.function, f"{only}.*") and change not in here
    ]
    print("\n".join(errors))
    print(summary(Counter(ends.values()), len(mutants)))
    raise SystemExit(bool(errors))


def run_tests(
    copy: Path, names: list[str], mutants: dict[str, Change], seconds: float
) -> dict[str, str]:
    """Return how each mutant ended."""
    ends: dict[str, str] = {}
    console = Console(stderr=True)
    with console.status("") as status, inside(copy):

        def report(name: str, end: str) -> None:
            ends[name] = end
            if end in (SURVIVED, UNTESTED):
                console.print(say(end, mutants[name]), markup=False)
            status.update(f"{len(ends)} of {len(names)} mutants, {Counter(ends.values())}")

        trials = Trials(names, report, seconds)
        options = ["-q", "--rootdir", str(copy), "--capture", "fd", *config().pytest_add_cli_args]
        tests = config().pytest_add_cli_args_test_selection
        code = pytest.main([*options, *tests], plugins=[trials])
    if code or trials.failed or len(ends) < len(names):
        raise SystemExit(f"the tests fail without a mutant: {trials.failed or code}")
    return ends


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Import from the folder, with the examples of hypothesis that mutants get."""
    os.environ["HYPOTHESIS_PROFILE"] = "few"
    sys.path.insert(0, str(folder))
    with contextlib.chdir(folder):
        yield


def summary(ends: Counter[str], total: int) -> str:
    noticed = ends[KILLED] + ends[TIMED_OUT]
    survived = ends[SURVIVED] + ends[UNTESTED]
    listed = total - noticed - survived
    return (
        f"{total} mutants: {ends[KILLED]} killed, {ends[TIMED_OUT]} timed out, {listed} listed as "
        f"equivalent, {survived} survived; score {noticed / (total - listed):.2%}"
    )


if __name__ == "__main__":
    typer.run(main)
