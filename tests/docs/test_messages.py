"""Every message that the page on troubleshooting quotes occurs in the source, word for word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.docs import pages

TEXT = pages.read("docs/troubleshooting.md")
BLOCKS = re.findall(r"^( *)```text\n(.*?)^ *```", TEXT, flags=re.M | re.S)
FOREIGN = re.findall(r"<!-- torch says it -->\n```text\n(.*?)\n```", TEXT, flags=re.S)
MESSAGES = [block.strip() for _, block in BLOCKS]
VALUE = 80  # characters that may be filled in
SYMPTOMS = ("not grow", "skipped", "too early", "out of memory", "NaN", "not in the saved model")


def pieces(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """The strings of a module, in the pieces between which something is filled in."""
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            yield tuple("" if text is None else str(text) for text in texts)
        elif isinstance(node, ast.Constant) and id(node) not in inside:
            yield tuple(re.split(r"%[drsg]", str(node.value)))


@cache
def source() -> list[tuple[str, ...]]:
    files = [*pages.ROOT.glob("drlora_core/**/*.py"), *pages.ROOT.glob("drlora_torch/**/*.py")]
    found = {text for file in files for text in pieces(ast.parse(file.read_text("utf-8")))}
    return [text for text in found if sum(map(len, text)) > 30]


def is_said(message: str) -> bool:
    """True if a string of the source makes the message, or the beginning of it that is quoted."""
    return any(makes(text, message) for text in source())


def makes(text: tuple[str, ...], message: str) -> bool:
    """True if the message consists of the pieces in order, with short values between them.

    The message may end early, inside a piece; then a piece of it has to have begun.
    """
    at, literal = 0, 0
    for number, piece in enumerate(text):
        room = VALUE if number else 0
        if not piece:
            continue
        found = message.find(piece, at, at + room + len(piece))
        if found < 0:
            starts = range(at, min(at + room, len(message) - 1) + 1)
            found = next((i for i in starts if piece.startswith(message[i:])), -1)
            return found >= 0 and literal + len(message) - found > 0.5 * len(message)
        at, literal = found + len(piece), literal + len(piece)
    return len(message) - at <= VALUE and literal > 0.5 * len(message)


@pytest.mark.parametrize("message", [m for m in MESSAGES if m not in FOREIGN])
def test_the_source_has_the_message(message: str) -> None:
    assert is_said(message)


def test_an_invented_message_is_not_found() -> None:
    assert not is_said("step 3: routing or importance is not very finite; the step counts twice")


def test_every_symptom_has_a_message() -> None:
    assert len(FOREIGN) == 1
    sections = re.split(r"^## ", TEXT, flags=re.M)[1:]
    for symptom in SYMPTOMS:
        (section,) = [each for each in sections if symptom in each.splitlines()[0]]
        assert "```text" in section
