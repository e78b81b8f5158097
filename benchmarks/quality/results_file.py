"""Results files: one JSON line per finished run."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from benchmarks.quality.errors import StudyError, describe
from benchmarks.quality.records import RunRecord


def read(path: Path) -> list[RunRecord]:
    """Read the runs of a file, oldest first; none if there is no file.

    Skips a last line without a line end: writing it was interrupted.

    Raises:
        StudyError: any other line is not a run.
    """
    if not path.exists():
        return []
    records = []
    *lines, _cut = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            records.append(RunRecord.model_validate_json(line))
        except ValidationError as error:
            raise StudyError(
                f"{path}, line {number} is not a run: {describe(error)}; delete it to redo the run"
            ) from None
    return records


def mend(path: Path) -> int:
    """Remove a last line without a line end.

    Returns:
        Number of removed bytes.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return len(content) - len(whole)


def append(path: Path, record: RunRecord) -> None:
    """Append a run and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(record.model_dump_json() + "\n")
        file.flush()
        os.fsync(file.fileno())
