"""Every example in the docstrings runs and gives what it says; tests/docs has those of pages."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import drlora_core

MODULES = [module.name for module in pkgutil.walk_packages(drlora_core.__path__, "drlora_core.")]
OPTIONAL = {"plotly", "typer", "rich", "hypothesis", "scipy", "jinja2"}  # extras of pyproject.toml


def run(tests: list[doctest.DocTest]) -> doctest.TestResults:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    return runner.summarize(verbose=False)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in OPTIONAL:
            pytest.skip(f"{name} needs {error.name}")
        raise
    assert run(doctest.DocTestFinder().find(module)).failed == 0


def test_the_main_modules_have_examples() -> None:
    """The search above finds something: no examples would pass as well."""
    for name in ("engine", "config", "policies", "testing"):
        module = importlib.import_module(f"drlora_core.{name}")
        assert any(test.examples for test in doctest.DocTestFinder().find(module)), name
