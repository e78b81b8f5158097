"""Load training and held-out rows with ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from drlora_torch.errors import DataError
from drlora_torch.finetune.options import FinetuneOptions, is_local

FORMATS = (("prompt", "completion"), ("messages",), ("text",))
LOADERS: dict[str, dict[str, str]] = {
    ".jsonl": {"path": "json"},
    ".json": {"path": "json"},
    ".txt": {"path": "text", "sample_by": "paragraph"},
}


def load_rows(options: FinetuneOptions) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load training and held-out rows.

    The held-out rows are the validation or test split of ``eval_data``, or its first split if it
    has neither. Without ``eval_data`` they are the validation or test split of ``data``, or a
    seeded random part of its training rows.
    """
    splits = _read(options.data)
    train = splits.get("train", next(iter(splits.values())))
    others = splits if options.eval_data is None else _read(options.eval_data)
    held_out = others.get("validation", others.get("test"))
    if held_out is None and options.eval_data is not None:
        held_out = next(iter(others.values()))
    elif held_out is None:
        if len(train) < 2:
            raise DataError(f"{options.data} has 1 row; use --eval-data, or give it at least 2")
        wanted = max(1, round(len(train) * options.eval_fraction))
        parts = train.train_test_split(test_size=min(wanted, len(train) - 1), seed=options.seed)
        train, held_out = parts["train"], parts["test"]
    return _select(train, options.data), _select(held_out, options.eval_data or options.data)


def _read(name: str) -> Any:
    """Load a file or a dataset id as a ``DatasetDict``."""
    arguments = {"path": name}
    if is_local(name):
        file = Path(name).expanduser()
        if file.suffix not in LOADERS:
            raise DataError(f"data {name!r} must end in one of {', '.join(LOADERS)}")
        if file.is_file() and file.stat().st_size == 0:
            raise DataError(f"data {name!r} is empty")
        arguments = {**LOADERS[file.suffix], "data_files": str(file)}
    try:
        splits = datasets.load_dataset(**arguments)
    except Exception as error:  # builders, hub clients and parsers have their own errors
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise DataError(f"data {name!r} could not be read: {reason}") from error
    if not any(len(rows) for rows in splits.values()):
        raise DataError(f"data {name!r} has no rows")
    return splits


def _select(rows: Any, name: str) -> Any:
    """Keep the columns of the first format that fits."""
    for columns in FORMATS:
        if set(columns) <= set(rows.column_names):
            return rows.select_columns(list(columns))
    accepted = "; ".join(" and ".join(columns) for columns in FORMATS)
    raise DataError(f"data {name!r} has columns {rows.column_names}; accepted: {accepted}")
