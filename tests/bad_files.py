"""Files that no command should trust, and what every refusal has in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.commands import call

DEEP = "[" * 100_000
CONTENTS: dict[str, bytes] = {
    "empty.json": b"",
    "truncated.json": b'{"model_type": "olmoe", "num_exp',
    "list.json": b"[1, 2]",
    "number.json": b"3",
    "binary.json": bytes(range(256)) * 4,
    "deep.json": DEEP.encode(),
    "nan.json": b'{"model_type": "olmoe", "num_experts": NaN, "num_hidden_layers": 2, '
    b'"hidden_size": 8, "intermediate_size": 8}',
    "negative.json": b'{"model_type": "olmoe", "num_experts": -4, "num_hidden_layers": 2, '
    b'"hidden_size": 8, "intermediate_size": 8}',
    "huge.json": b'{"model_type": "olmoe", "num_experts": 4, "num_hidden_layers": 1'
    + b"0" * 30
    + b', "hidden_size": 8, "intermediate_size": 8}',
    "empty.npz": b"",
    "binary.npz": b"PK\x03\x04" + bytes(200),
    "taken.html": b"mine",
}


def write_all(folder: Path) -> None:
    """Write the files, and folders without content."""
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    for name in ("folder", "folder.npz"):
        (folder / name).mkdir()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, with the content of files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def check_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, line: list[str], message: str
) -> None:
    """Run a command: it must say one sentence, exit with 2 and leave the folder as it was."""
    before = tree(folder)
    result = call(capsys, *line)
    assert result.code == 2, result.err
    assert message in result.err, result.err
    assert result.err.startswith("drlora: ")
    assert result.err.count("\n") == 1
    assert result.out == ""
    assert tree(folder) == before
