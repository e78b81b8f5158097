"""The documentation site is built without a warning, and holds what it should."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import typer

import drlora_core
import drlora_torch
from drlora_core import diagnostics, plots, report, runs
from drlora_core.cli.app import build
from tests.docs import pages

pytestmark = pytest.mark.slow
for library in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(library, reason='needs the extra "docs"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(folder)],
        cwd=pages.ROOT,
        env=os.environ | {"PYTHONPATH": str(pages.ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "WARNING" not in ended.stderr
    return folder


def names_in(inventory: Path) -> set[str]:
    """The names in an inventory of objects, as Sphinx and mkdocstrings write it."""
    *_, compressed = inventory.read_bytes().split(b"\n", maxsplit=4)
    return {line.split(" ")[0] for line in zlib.decompress(compressed).decode().splitlines()}


def test_the_reference_has_every_public_name(site: Path) -> None:
    known = names_in(site / "objects.inv")
    for package in (drlora_core, drlora_torch, diagnostics, plots, report, runs):
        for name in package.__all__:
            found = getattr(package, name)
            home = f"{getattr(found, '__module__', '')}.{name}"  # some are called like modules
            assert {f"{package.__name__}.{name}", home} & known, name


def test_the_command_line_reference_is_the_help(site: Path) -> None:
    page = html.unescape(re.sub("<[^>]*>", "", (site / "reference" / "cli.html").read_text()))
    group = typer.main.get_group(build()[0])
    assert len(group.commands) >= 10
    for name, command in group.commands.items():
        assert f"Usage: drlora {name}" in page
        for param in command.params:
            options = [text for text in param.opts if text.startswith("-")]
            assert all(text in page for text in options), (name, options)


def test_equations_are_rendered(site: Path) -> None:
    page = (site / "concepts.html").read_text()
    assert page.count('display="block"') == len(re.findall(r"^\$\$\n[^$]", read_concepts(), re.M))
    for path in site.rglob("*.html"):
        text = re.sub(r"<(pre|code).*?</\1>", "", path.read_text(), flags=re.S)
        assert "arithmatex" not in text, path.name
        assert "$$" not in text, path.name


def read_concepts() -> str:
    """The page with one line for each equation: its opening dollars."""
    parts = pages.read("docs/concepts.md").split("$$\n")
    return "".join(f"$$\nequation\n{text}" for text in parts[2::2])


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//"
    loads += r"|<link\b[^>]*href=\"(?:https?:)?//"
    for path in site.rglob("*.html"):
        found = re.findall(loads, path.read_text())
        assert found == [], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", path.read_text()), path.name


def test_no_directive_is_left_in_the_pages(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = re.sub("<[^>]*>", "", path.read_text())
        assert not re.search(r":(?:func|class|meth|mod):|^::: ", text, flags=re.M), path.name
        assert "<!-- commands -->" not in path.read_text()
