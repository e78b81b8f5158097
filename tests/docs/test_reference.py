"""The API reference names every public name, and what the pages link to exists."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

import drlora_core
import drlora_torch
from tests.docs import pages

REFERENCE = {page: pages.read(page) for page in pages.PAGES if page.startswith("docs/reference/")}
MODULES = [name for text in REFERENCE.values() for name in re.findall(r"^::: (\S+)", text, re.M)]
LINKS = sorted(
    {
        name
        for page in pages.PAGES
        for name in re.findall(r"\]\[(drlora_[\w.]+)\]", pages.read(page))
    }
)


def find(dotted: str) -> Any:
    """Import the module of a dotted name and look up the rest."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


def test_both_packages_are_documented_as_a_whole() -> None:
    assert {"drlora_core", "drlora_torch"} <= set(MODULES)
    for package in ("drlora_core", "drlora_torch"):
        text = REFERENCE[f"docs/reference/{package}.md"]
        assert "members:" not in text  # all of __all__
        assert "members_order: __all__" in text


@pytest.mark.parametrize("module", MODULES)
def test_a_documented_module_exists(module: str) -> None:
    assert inspect.getdoc(find(module))


@pytest.mark.parametrize("package", [drlora_core, drlora_torch])
def test_every_public_name_has_a_docstring(package: Any) -> None:
    missing = [name for name in package.__all__ if not inspect.getdoc(getattr(package, name))]
    assert missing == []


@pytest.mark.parametrize("name", LINKS)
def test_a_linked_name_exists_in_a_documented_module(name: str) -> None:
    assert callable(find(name))
    assert any(name.startswith(f"{module}.") for module in MODULES)


def test_the_equations_link_to_their_functions() -> None:
    text = pages.read("docs/concepts.md")
    sections = [part for part in re.split(r"^## ", text, flags=re.M)[1:] if "\n$$\n" in part]
    assert len(sections) >= 9
    for section in sections:
        assert re.search(r"^Functions?: \[`", section, flags=re.M), section.splitlines()[0]
