"""What the tests of the command line share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.core import commands, recorded

OLMOE = {
    "model_type": "olmoe",
    "num_experts": 64,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
}


@pytest.fixture
def drlora(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the console script, into a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)  # workers of pytest-xdist have it
    return lambda *arguments: commands.call(capsys, *arguments)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(OLMOE))
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "first"
    path.mkdir()
    recorded.record(path / "recording")
    return path
