"""Tasks from .jsonl files: prompt and completion, question and answer (GSM8K), or chat messages.

``train.jsonl`` alone is split by a hash of each row's prompt; ``train.jsonl,test.jsonl`` takes the
second file as the test split and drops training rows whose prompt is in it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.quality.tasks.task import Row, Task

PART = 10
"""A tenth of the rows is held out for validation, another tenth for the test."""
MOST_HELD_OUT = 400
"""Maximum rows of a held-out split; otherwise evaluation would cost more than training."""


def read_task(paths: str) -> Task:
    """Read a task from one file, or from ``train.jsonl,test.jsonl``.

    Raises:
        ValueError: a file is missing, a row is empty or has unknown fields, or a split has no rows.
    """
    train_path, _, test_path = paths.partition(",")
    rows = read_rows(Path(train_path))
    if test_path:
        test = read_rows(Path(test_path))
        apart = {row["prompt"] for row in test}
        rows = [row for row in rows if row["prompt"] not in apart]
    else:
        test = [row for row in rows if _part(row) == 1]
        rows = [row for row in rows if _part(row) != 1]
    validation = [row for row in rows if _part(row) == 0]
    train = [row for row in rows if _part(row) != 0]
    task = Task(paths, tuple(train), _shorten(validation), _shorten(test))
    for name, split in task.splits.items():
        if not split:
            raise ValueError(f"{paths!r} leaves no rows for {name}; give more rows, at least 100")
    return task


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a .jsonl file as prompts and completions."""
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; give a task's name or a .jsonl file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = as_row(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return rows


def as_row(record: dict[str, Any]) -> Row:
    """Convert a record of any accepted format to prompt and completion."""
    if "messages" in record:
        prompt, completion = _from_messages(record["messages"])
    elif "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
    elif "answer" in record:
        prompt, completion = f"{record['question']}\n", record["answer"]
    else:
        raise ValueError(
            f"a row has the fields {sorted(record)}; accepted: prompt and completion, "
            "question and answer, or messages"
        )
    if not prompt or not completion.strip():
        raise ValueError("a row's prompt or completion is empty")
    return {"prompt": prompt, "completion": completion}


def _from_messages(messages: list[dict[str, str]]) -> tuple[str, str]:
    """Join a chat; its last message, from the assistant, is the completion."""
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's")
    turns = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages[:-1]]
    return "".join([*turns, "Assistant:"]), f" {messages[-1]['content'].strip()}"


def _digest(row: Row) -> bytes:
    return hashlib.sha256(row["prompt"].encode()).digest()


def _part(row: Row) -> int:
    return int.from_bytes(_digest(row)[:8], "big") % PART


def _shorten(rows: list[Row]) -> tuple[Row, ...]:
    """Sample the rows of a long split with the smallest hashes; keeps their order."""
    chosen = sorted(range(len(rows)), key=lambda i: _digest(rows[i]))[:MOST_HELD_OUT]
    return tuple(rows[i] for i in sorted(chosen))
