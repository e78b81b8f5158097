"""Run the console script in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest


class Result:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run ``drlora`` with these arguments."""
    from drlora_core.cli import main

    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int) or code is None
    return Result(code or 0, captured.out, captured.err)
