"""Mutants that no test can notice, with the reason of each: survivors.toml beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import tomllib

LISTED = Path(__file__).with_name("survivors.toml")


class Change(NamedTuple):
    """What a mutant changes: lines without their indentation."""

    function: str
    was: str
    becomes: str


def read_listed(path: Path = LISTED) -> list[Change]:
    """Read the list; every entry has a reason."""
    entries = tomllib.loads(path.read_text())["survivor"]
    assert all(entry["reason"] for entry in entries)
    return [
        Change(entry["function"], entry["was"], becomes)
        for entry in entries
        for becomes in entry["becomes"]
    ]


def say(what: str, change: Change) -> str:
    return f"{what}: {change.function}\n  - {change.was}\n  + {change.becomes}"
