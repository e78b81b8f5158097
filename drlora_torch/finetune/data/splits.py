"""Read and check the rows to train on and those to evaluate on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from drlora_torch.errors import DataError
from drlora_torch.finetune.data import files
from drlora_torch.finetune.data.files import Row
from drlora_torch.finetune.data.formats import Example, Reader
from drlora_torch.finetune.options import FinetuneOptions, is_local

LOOKED_AT = 1000
"""Streamed rows that are tokenized before the training, to find what is wrong early."""
Rows = Callable[[], Iterator[Row]]
"""Starts to read the rows of a split anew."""


class Examples(NamedTuple):
    """Checked rows of a split."""

    examples: list[tuple[Example, str]]
    """Each with its place."""
    reader: Reader
    digest: str
    """Hash of all rows, also of those of a stream that are not kept."""

    @property
    def needs_template(self) -> bool:
        """True if the rows are messages."""
        lists = ("messages", "prompt", "completion", "chosen")
        return any(isinstance(e.get(name), list) for e, _ in self.examples for name in lists)

    def some(self, numbers: Iterable[int]) -> Examples:
        """Return those of some numbers."""
        return self._replace(examples=[self.examples[number] for number in numbers])


class Read(NamedTuple):
    """Checked rows to train on (of a stream: the first ones) and to evaluate on."""

    train: Examples
    held_out: Examples
    source: Rows


def read(options: FinetuneOptions, chat: bool) -> Read:
    """Read and check all rows; of streamed ids on a hub, the first ones.

    Raises:
        DataError: nothing there, unreadable, or a row that cannot be used: names file, row, field.
    """
    splits = _splits(options.data, options.streaming)
    train = splits.get(options.split)
    if train is None:
        known = ", ".join(splits)
        raise DataError(
            f"data {options.data!r} has no split {options.split!r} to train on (it has {known}); "
            "use --split"
        )
    splits = {name: rows for name, rows in splits.items() if name != options.split}
    others = splits if options.eval_data is None else _splits(options.eval_data, False)
    held_out = others.get("validation", others.get("test"))
    if held_out is None and options.eval_data is not None:
        held_out = next(iter(others.values()))
    found = _examples(options, options.data, train, chat, options.streaming)
    if held_out is not None:
        rest = _examples(options, options.eval_data or options.data, held_out, chat, False)
        return Read(found, rest, train)
    if options.streaming:
        raise DataError("--streaming needs --eval-data: the data has no split to hold out")
    if len(found.examples) < 2:
        raise DataError(f"{options.data} has 1 row; use --eval-data, or give it at least 2")
    wanted = max(1, round(len(found.examples) * options.eval_fraction))
    places = datasets.Dataset.from_dict({"row": list(range(len(found.examples)))})
    parts = places.train_test_split(
        test_size=min(wanted, len(places) - 1), seed=options.seed, load_from_cache_file=False
    )
    return Read(found.some(parts["train"]["row"]), found.some(parts["test"]["row"]), train)


def _examples(
    options: FinetuneOptions, name: str, rows: Rows, chat: bool, streaming: bool
) -> Examples:
    reader = Reader(name, options.method, options.columns, chat)
    kept: list[tuple[Example, str]] = []
    digest = hashlib.sha256()
    for row in rows():
        example = reader.read(row)
        if streaming:
            digest.update(json.dumps(example, sort_keys=True).encode())
        if not streaming or len(kept) < LOOKED_AT:
            kept.append((example, row.place))
        elif not is_local(name):
            break
    if not kept:
        raise DataError(f"data {name!r} has no rows")
    return Examples(kept, reader, digest.hexdigest())


def _splits(name: str, streaming: bool) -> dict[str, Rows]:
    """Return how to read each split of a file, a folder or a dataset id."""
    if is_local(name):
        found = files.find_files(Path(name).expanduser())
        return {split: _rows_of_files(some) for split, some in found.items()}
    try:
        loaded = datasets.load_dataset(name, streaming=streaming)
    except Exception as error:  # builders, hub clients and parsers have their own errors
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise DataError(f"data {name!r} could not be read: {reason}") from error
    return {split: _rows_of_split(rows, f"{name}, {split}") for split, rows in loaded.items()}


def _rows_of_files(some: list[Path]) -> Rows:
    def rows() -> Iterator[Row]:
        for file in some:
            yield from files.read_file(file)

    return rows


def _rows_of_split(dataset: Any, place: str) -> Rows:
    def rows() -> Iterator[Row]:
        for number, values in enumerate(dataset, 1):
            yield Row(values, f"{place}, row {number}")

    return rows
