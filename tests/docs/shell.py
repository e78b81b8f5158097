"""Checks commands against the real command line, without running them."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
from functools import cache
from typing import Any

import typer
from packaging.requirements import Requirement

from drlora_core.cli.app import build
from tests.test_readme import ROOT, tomllib

OTHERS = {"accelerate", "git", "hf", "mkdocs", "pre-commit", "source", "transformers", "vllm"}
"""Programs that are not ours: only their names are checked."""


@cache
def commands() -> dict[str, Any]:
    return dict(typer.main.get_group(build()[0]).commands)


def options_with_values(name: str) -> set[str]:
    """The options of a command that take a value."""
    options = [each for each in commands()[name].params if not getattr(each, "is_flag", True)]
    return {text for each in options for text in each.opts}


def split(source: str) -> list[list[str]]:
    """The commands of a block, as words, without variables, redirections and what is a comment."""
    joined = re.sub(r"\\\n", " ", source)
    found: list[list[str]] = []
    for line in joined.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|<>;")
        lexer.whitespace_split = True
        words, redirected = [], False
        for word in [*lexer, "&&"]:
            if set(word) <= set("&|<>;"):
                found += [words] if words and not redirected else []
                words, redirected = [], set(word) <= set("<>")
            else:
                words.append(word)
    return [words for words in found if words]


def check(words: list[str]) -> None:
    """Refuse a command that does not exist, or has an option that does not exist."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "drlora":
        check_drlora(rest)
    elif program == "torchrun" and "--no-python" in rest:
        check(rest[rest.index("--no-python") + 1 :])
    elif program in ("python", "torchrun", "bash", "pytest"):
        check_files(program, rest)
    elif program == "pip":
        check_pip(rest)
    else:
        assert program in OTHERS, words


def check_drlora(words: list[str]) -> None:
    if words[:1] in ([], ["--version"], ["--help"]):
        return
    name, *rest = words
    assert name in commands(), f"no command {name!r}"
    if "--help" not in rest:
        commands()[name].make_context(name, rest)  # refuses unknown options


def check_files(program: str, words: list[str]) -> None:
    """Modules and files that are named exist."""
    if words[:1] == ["-m"] and program == "python":
        assert words[1] == "venv" or importlib.util.find_spec(words[1]) is not None, words
        return
    for word in words:
        if word.endswith((".py", "/run", "/oldest")) and "/" in word:
            assert (ROOT / word).is_file(), word


def check_pip(words: list[str]) -> None:
    """Extras are those of pyproject.toml, and a file of constraints exists."""
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for option, word in itertools.pairwise(words):
        if option == "-c":
            assert (ROOT / word).is_file(), word
    for word in words[1:]:
        if "[" in word:
            given = Requirement(word.replace(".[", "drlora[", 1) if word[0] == "." else word)
            assert given.name == "drlora"
            assert given.extras <= set(extras["optional-dependencies"]), word
