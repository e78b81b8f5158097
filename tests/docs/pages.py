"""The pages of the documentation, and the blocks of code in them.

Every block runs, unless an HTML comment before it says why it cannot:
``<!--- skip: next "starts a server" -->``. Commands of skipped blocks are parsed all the same.
Blocks of a page run in order and share their names; ``<!--- invisible-code-block: python -->``
prepares what a reader does not have to see.
"""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any
from unittest import SkipTest

import yaml
from sybil import Document, Example, Sybil
from sybil.evaluators.skip import Skipper
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from tests.docs import commands
from tests.test_readme import ROOT

DOCS = ROOT / "docs"
GENERATED = ("results.md", "results_notes.md", "results/", "parity.md")  # no code in them
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
        ROOT / "examples" / "recipes" / "README.md",
        *DOCS.rglob("*.md"),
    )
    if not path.relative_to(ROOT).as_posix().removeprefix("docs/").startswith(GENERATED)
)
LANGUAGES = {"python", "pycon", "bash", "json", "yaml", "text"}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def parse(page: str, *languages: str, folder: Path | None = None) -> Document:
    """Find the examples of a page that are in these languages."""
    parsers: dict[str, Any] = {
        "python": PythonCodeBlockParser(),
        "pycon": CodeBlockParser("pycon", run_session),
        "bash": CodeBlockParser(
            "bash", lambda example: commands.run(example.parsed, folder or ROOT, page)
        ),
        "json": CodeBlockParser("json", read_json),
        "yaml": CodeBlockParser("yaml", read_yaml),
    }
    chosen = [
        parser if language in languages else CodeBlockParser(language, lambda example: None)
        for language, parser in parsers.items()
    ]  # skipping takes all blocks into account
    return Sybil([SkipParser(), *chosen], path=str(ROOT)).parse(ROOT / page)


def run(document: Document) -> tuple[int, list[str]]:
    """Run the examples of a page; return how many ran, and why others did not."""
    ran, reasons = 0, []
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            reasons.append(str(skipped))
        else:
            ran += not isinstance(example.region.evaluator, Skipper)
    return ran, reasons


def run_session(example: Example) -> None:
    """Run what a console shows, and compare what it prints."""
    test = doctest.DocTestParser().get_doctest(
        example.parsed, {}, example.path, example.path, example.line
    )
    test.globs, printed = example.namespace, []
    assert (
        doctest.DocTestRunner(optionflags=OPTIONS)
        .run(test, out=printed.append, clear_globs=False)
        .failed
        == 0
    ), "".join(printed)


def read_json(example: Example) -> None:
    for line in example.parsed.splitlines():
        assert isinstance(json.loads(line), dict)


def read_yaml(example: Example) -> None:
    from drlora_torch.finetune.recipe import Recipe

    Recipe.model_validate(yaml.safe_load(example.parsed))
