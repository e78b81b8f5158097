"""Load training and held-out rows with ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drlora_torch.errors import DataError
from drlora_torch.finetune.options import FinetuneOptions, is_local

FORMATS = (("prompt", "completion"), ("messages",), ("text",))
HELD_OUT_SPLITS = ("validation", "test")


def load_rows(options: FinetuneOptions) -> tuple[Any, Any]:
    """Load training and held-out rows, both ``datasets.Dataset``.

    The held-out rows are the validation or test split of ``eval_data``, or its first split if it
    has neither. Without ``eval_data`` they are the validation or test split of ``data``, or a
    seeded random part of its training rows.

    Raises:
        DataError: the data cannot be read, are empty, or have none of the accepted columns.
    """
    splits = _read(options.data)
    train = _columns(splits.get("train", next(iter(splits.values()))), options.data)
    if options.eval_data is not None:
        others = _read(options.eval_data)
        held_out = _held_out_split(others) or next(iter(others.values()))
        return train, _columns(held_out, options.eval_data)
    if (held_out := _held_out_split(splits)) is not None:
        return train, _columns(held_out, options.data)
    if len(train) < 2:
        raise DataError(
            f"{options.data} has {len(train)} row; at least 2 are needed to hold one out, "
            "or use --eval-data"
        )
    wanted = max(1, round(len(train) * options.eval_fraction))
    parts = train.train_test_split(test_size=min(wanted, len(train) - 1), seed=options.seed)
    return parts["train"], parts["test"]


def _held_out_split(splits: Any) -> Any:
    return next((splits[name] for name in HELD_OUT_SPLITS if name in splits), None)


def _read(name: str) -> Any:
    """Load a file or a dataset id as a ``DatasetDict``."""
    import datasets

    arguments = _file_arguments(name) if is_local(name) else (name, {})
    try:
        splits = datasets.load_dataset(arguments[0], **arguments[1])
    except Exception as error:  # builders, hub clients and parsers have their own errors
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n")[0] or type(cause).__name__
        what = (
            "could not be read"
            if is_local(name)
            else "is neither a file nor a dataset that can be loaded"
        )
        raise DataError(f"data {name!r} {what}: {reason}") from error
    if not splits or all(len(rows) == 0 for rows in splits.values()):
        raise DataError(f"data {name!r} has no rows")
    return splits


def _file_arguments(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"there is no file {name!r}; accepted: a .jsonl, .json or .txt file, or an id"
        )
    if path.stat().st_size == 0:
        raise DataError(f"data {name!r} is empty")
    if path.suffix == ".txt":
        return "text", {"data_files": str(path), "sample_by": "paragraph"}
    if path.suffix in {".jsonl", ".json"}:
        return "json", {"data_files": str(path)}
    raise DataError(f"data {name!r} ends in {path.suffix!r}; accepted: .jsonl, .json, .txt")


def _columns(rows: Any, name: str) -> Any:
    """Select the columns of the first format that fits the rows."""
    for columns in FORMATS:
        if set(columns) <= set(rows.column_names):
            return rows.select_columns(list(columns))
    accepted = "; ".join(" and ".join(columns) for columns in FORMATS)
    raise DataError(f"data {name!r} has columns {rows.column_names}; accepted: {accepted}")


def check_template(rows: Any, tokenizer: Any, model: str) -> None:
    """Refuse chat messages if the tokenizer cannot format them.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if "messages" in rows.column_names and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"the data has messages, but the tokenizer of {model!r} has no chat template; use "
            "prompt and completion instead, or an instruction-tuned model"
        )
