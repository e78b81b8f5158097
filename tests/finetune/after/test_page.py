"""The pages about runs: every command in them exists, with these options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from drlora_core.cli.app import build

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("page", ["docs/after_training.md", "examples/recipes/README.md"])
def test_its_commands_can_be_parsed(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("drlora ")]
    assert len(lines) >= 2
    commands = typer.main.get_group(build()[0]).commands
    for line in lines:
        _, name, *words = shlex.split(line.partition(" < ")[0])
        commands[name].make_context(name, words)  # refuses unknown options
