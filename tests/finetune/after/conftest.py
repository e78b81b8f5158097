"""A finished run and an unfinished one, trained once, and a way to call commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from drlora_core.cli import main
from drlora_torch.finetune import folder, job
from tests.finetune.test_finetune import options_for


class Said(NamedTuple):
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture(scope="session")
def run(moe_folder: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests must leave it as it is."""
    path = tmp_path_factory.mktemp("after") / "run"
    recipe = options_for(moe_folder, sums, steps=8, save_every=4, learning_rate=0.1)
    job.run(recipe, path, Console(quiet=True))
    return path


@pytest.fixture(scope="session")
def unfinished(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after its fourth step."""
    path = tmp_path_factory.mktemp("unfinished") / "run"
    shutil.copytree(run, path)
    shutil.rmtree(path / folder.ADAPTER)
    shutil.rmtree(path / folder.CHECKPOINTS / "checkpoint-8")
    (path / folder.RESULT).unlink()
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Call ``drlora`` in this process."""

    def run_command(*arguments: object) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Said(int(stopped.value.code or 0), said.out, said.err)

    return run_command
