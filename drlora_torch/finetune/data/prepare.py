"""Tokenize the rows of a run and sum them up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import pyarrow
import trl
from rich.console import Console
from rich.progress import track

from drlora_torch.errors import DataError
from drlora_torch.finetune.data.encode import Encoded, Encoder
from drlora_torch.finetune.data.formats import Example
from drlora_torch.finetune.data.splits import Examples, Read
from drlora_torch.finetune.data.summary import Counter, Summary, mark
from drlora_torch.finetune.options import FinetuneOptions

SHUFFLED = 1000
"""Streamed rows among which the next one is drawn."""
Row = TypeVar("Row")


class Prepared(NamedTuple):
    """What a trainer takes."""

    train: Any
    """``datasets.Dataset``, or ``IterableDataset`` where it is streamed."""
    held_out: Any
    summary: Summary
    largest_id: int
    """Largest token id that was seen."""
    sequences: int | None
    """Sequences of an epoch, which packing makes fewer than rows; None for a stream."""


def prepare(read: Read, options: FinetuneOptions, tokenizer: Any, console: Console) -> Prepared:
    """Tokenize rows and sum them up.

    Raises:
        DataError: no token bears loss.
    """
    encoder = Encoder(tokenizer, options.train_on)
    counter, others = Counter(), Counter()
    train = _encode(read.train, encoder, options, counter, console)
    held_out = _encode(read.held_out, encoder, options, others, console)
    first = _first(read.train, encoder, options)
    assert read.train.reader.format is not None
    summary = Summary(
        format=", ".join(read.train.reader.format.needs),
        ignored=read.train.reader.ignored,
        rows=counter.rows,
        read=counter.read,
        cut=counter.cut,
        dropped=counter.dropped,
        tokens=counter.tokens,
        loss_tokens=counter.loss_tokens,
        longest=counter.longest,
        held_out=others.rows,
        held_out_read=others.read,
        tokens_cut=counter.tokens_cut,
        complete=not options.streaming,
        digest=counter.digest + others.digest + read.train.digest,
        example=mark(tokenizer, first),
    )
    made = _stream(read, encoder, options) if options.streaming else _dataset(train)
    largest = max(counter.largest_id, others.largest_id)
    sequences = None if options.streaming else len(train)
    if options.packing and not options.streaming:
        sequences = len(trl.pack_dataset(made, options.max_length, "bfd"))
    return Prepared(made, _dataset(held_out), summary, largest, sequences)


def _encode(
    found: Examples, encoder: Encoder, options: FinetuneOptions, counter: Counter, console: Console
) -> list[dict[str, Any]]:
    rows = []
    for example, place in track(
        found.examples,
        "tokenizing",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        whole = encoder.encode(example, place)
        kept = _kept(whole, options.max_length)
        counter.add(whole, kept)
        if kept:
            rows.append(_row(example, kept, options))
    if rows and counter.loss_tokens:
        return rows
    if not counter.longest:
        raise DataError(
            f"the tokenizer of {options.model!r} makes no tokens: it has no vocabulary; give a "
            "model with a tokenizer"
        )
    raise DataError(
        f"no row has a token that bears loss within --max-length {options.max_length}: prompts "
        f"fill it (the longest row has {counter.longest} tokens); use a larger --max-length"
    )


def _kept(whole: list[Encoded], length: int) -> list[Encoded]:
    """The first tokens of each sequence; nothing if one of them then bears no loss."""
    cut = [each.cut(length) for each in whole]
    # the first token of a sequence is never predicted
    return cut if all(any(t >= 0 for t in each.labels[1:]) for each in cut) else []


def _row(example: Example, kept: list[Encoded], options: FinetuneOptions) -> dict[str, Any]:
    """What the trainer takes: tokens, or the texts of a preference pair."""
    return dict(example) if options.method == "dpo" else kept[0]._asdict()


def _first(found: Examples, encoder: Encoder, options: FinetuneOptions) -> Encoded:
    encoded = (_kept(encoder.encode(*each), options.max_length) for each in found.examples)
    return next(kept for kept in encoded if kept)[0]


def _dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_list(rows)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"the messages of some rows have fields of other kinds than those of others: {error}"
        ) from error


def _stream(read: Read, encoder: Encoder, options: FinetuneOptions) -> datasets.IterableDataset:
    """Rows without an end, pass after pass: a Trainer can only skip within one."""

    def encoded() -> Iterator[dict[str, Any]]:
        for passes in itertools.count():
            generator = np.random.default_rng((options.seed, passes))
            for row in shuffled(read.source(), generator):
                example = read.train.reader.read(row)
                if kept := _kept(encoder.encode(example, row.place), options.max_length):
                    yield kept[0]._asdict()

    return datasets.IterableDataset.from_generator(encoded)


def shuffled(rows: Iterable[Row], generator: np.random.Generator) -> Iterator[Row]:
    """Yield the rows, each drawn among the next ``SHUFFLED``."""
    waiting: list[Row] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == SHUFFLED:
            place = int(generator.integers(SHUFFLED))
            waiting[place], waiting[-1] = waiting[-1], waiting[place]
            yield waiting.pop()
    yield from (waiting[place] for place in generator.permutation(len(waiting)))
