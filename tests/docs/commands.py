"""Runs the commands of a page as a reader does, in the folder that the reader is in.

Blocks of nothing but ``drlora`` commands run in this process, where torch is imported already. All
others run in one shell.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

from drlora_core.cli import main
from tests.docs import shell
from tests.test_readme import ROOT

SHELL = r"[|<>$&`]|--processes"
"""What a block needs a shell for; ``--processes`` changes the environment of its process."""
STEPS = 6
SHORTENED = {
    "docs/distributed.md",
    "docs/finetuning.md",
    "docs/howto/data_formats.md",
    "docs/quantization.md",
}
"""Pages whose runs make 6 steps here, instead of 100 or 200."""


def shorten(source: str) -> str:
    """Add ``--steps`` to the runs of a block, or replace the number that they have."""
    joined = re.sub(r" *\\\n *", " ", source)
    run = r"^(drlora finetune .*?)(?: --steps \d+)?( *#.*)?$"
    return re.sub(run, rf"\1 --steps {STEPS}\2", joined, flags=re.M)


def run(source: str, folder: Path, page: str) -> None:
    """Run a block of commands; the first one that fails ends it."""
    source = shorten(source) if page in SHORTENED else source
    words = shell.split(source)
    if re.search(SHELL, source) or any(program != "drlora" for program, *_ in words):
        run_in_shell(source, folder)
        return
    with chdir(folder):
        for _, *rest in words:
            with pytest.raises(SystemExit) as ended:
                main(rest)
            assert ended.value.code == 0, rest


def run_in_shell(source: str, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    given = {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", source],
        cwd=folder,
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, f"{source}\n{ended.stdout}\n{ended.stderr}"
