"""What a run is about to train on, in figures and one example."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.text import Text

from drlora_core import atomic
from drlora_core.cli.console import say
from drlora_torch.errors import RunError
from drlora_torch.finetune.data.encode import NO_LOSS, Encoded

FILE = "data.json"
"""In the folder of a run."""
SHOWN_CHARACTERS = 600
OPEN, CLOSE = "[[", "]]"


class Summary(BaseModel):
    """Rows and tokens of the training data, after ``max_length``."""

    model_config = ConfigDict(frozen=True)

    format: str
    """The columns that were read."""
    ignored: tuple[str, ...]
    """Columns that were not."""
    rows: int
    """Rows that are trained on."""
    read: int
    """Rows that were read from the data, without those that are held out."""
    cut: int
    """Rows that ``max_length`` shortens."""
    dropped: int
    """Rows that are left out: nothing in them bears loss, within ``max_length``."""
    tokens: int
    """Tokens of an epoch."""
    tokens_cut: int
    """Tokens that ``max_length`` cuts off, dropped rows included."""
    loss_tokens: int
    """Tokens of an epoch that bear loss."""
    longest: int
    """Tokens of the longest row, before it is cut."""
    held_out: int
    """Rows to evaluate on."""
    held_out_read: int
    """The same before rows without a token that bears loss are left out."""
    complete: bool = True
    """False for streamed data: rows and tokens are those of the first rows."""
    digest: str
    """Hash of the tokens and labels, and of all rows of a stream."""
    example: str
    """The first row as text, with what bears loss in ``[[ ]]``."""


class Counter:
    """Counts rows and tokens on their way."""

    def __init__(self) -> None:
        self.read = self.rows = self.cut = self.dropped = 0
        self.tokens = self.loss_tokens = self.longest = self.largest_id = self.tokens_cut = 0
        self._hash = hashlib.sha256()

    def add(self, whole: list[Encoded], kept: list[Encoded]) -> None:
        """Count a row: its sequences before ``max_length``, and after (none if it is dropped)."""
        self.read += 1
        self.longest = max(self.longest, *(len(each.input_ids) for each in whole))
        lengths = (sum(len(each.input_ids) for each in some) for some in (whole, kept))
        self.tokens_cut += next(lengths) - next(lengths)
        if not kept:
            self.dropped += 1
            return
        self.rows += 1
        self.cut += any(
            len(a.input_ids) > len(b.input_ids) for a, b in zip(whole, kept, strict=True)
        )
        self.tokens += sum(len(each.input_ids) for each in kept)
        self.loss_tokens += sum(each.loss_tokens for each in kept)
        for each in kept:
            self.largest_id = max(self.largest_id, *each.input_ids)
            self._hash.update(np.array([each.input_ids, each.labels], dtype=np.int64).tobytes())

    @property
    def digest(self) -> str:
        """Hash of the tokens and labels that were counted."""
        return self._hash.hexdigest()


def mark(tokenizer: Any, row: Encoded) -> str:
    """Return a row as text, with the parts that bear loss in ``[[ ]]``."""
    text, start = "", 0
    while start < len(row.labels):
        learned, end = row.labels[start] != NO_LOSS, start
        while end < len(row.labels) and (row.labels[end] != NO_LOSS) is learned:
            end += 1
        part = tokenizer.decode(row.input_ids[start:end])
        text += f"{OPEN}{part}{CLOSE}" if learned else part
        start = end
    return text


def write(folder: Path, summary: Summary) -> None:
    """Write what a run trains on, in figures."""
    atomic.write_text(folder / FILE, summary.model_dump_json(indent=2) + "\n")


def check_same(folder: Path, summary: Summary) -> None:
    """Refuse to go on with other data than a run began with.

    Raises:
        RunError: the tokens differ; says how.
    """
    path = folder / FILE
    if not path.is_file():
        return
    try:
        before = Summary.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RunError(f"{str(path)!r} is damaged; delete it to go on without a check") from error
    if before.digest != summary.digest:
        raise RunError(
            f"the training data has changed since the run in {str(folder)!r} began "
            f"({before.rows:,} rows, {before.tokens:,} tokens then; {summary.rows:,} and "
            f"{summary.tokens:,} now), or the tokenizer has; restore it, or begin a new run"
        )


def show(
    console: Console, summary: Summary, steps: int, rows_per_step: int, sequences: int | None
) -> None:
    """Print a summary: what is trained on, and for how many epochs.

    Args:
        console: where to.
        summary: of the training data.
        steps: optimizer steps.
        rows_per_step: rows of a step; with packing, sequences.
        sequences: those of an epoch; None for a stream.
    """
    epochs = steps / math.ceil((sequences or 1) / rows_per_step)
    first = "" if summary.complete else "first "
    left_out = ""
    if summary.held_out < summary.held_out_read:
        left_out = f" of {summary.held_out_read:,}, the others without loss"
    figures = {
        "columns": summary.format,
        "ignored columns": ", ".join(summary.ignored),
        f"{first}rows to train on": f"{summary.rows:,}",
        "tokens cut off": f"{summary.tokens_cut:,}" if summary.tokens_cut else "",
        "rows cut by max_length": f"{summary.cut:,}" if summary.cut else "",
        "rows without loss, left out": f"{summary.dropped:,}" if summary.dropped else "",
        "rows held out": f"{summary.held_out:,}{left_out}",
        f"tokens of these {first}rows": f"{summary.tokens:,}",
        "of them bear loss": f"{summary.loss_tokens:,}",
        "longest row in tokens": f"{summary.longest:,}",
        "packed sequences": f"{sequences:,}" if sequences not in (None, summary.rows) else "",
        "steps": f"{steps:,} of {rows_per_step:,}",
        "epochs": "" if sequences is None else f"{epochs:.2f}",
    }
    width = max(map(len, figures))
    lines = [f"  {name:{width}}  {value}" for name, value in figures.items() if value]
    example = summary.example
    if len(example) > SHOWN_CHARACTERS:
        example = example[:SHOWN_CHARACTERS] + "..."
    lines += [f"An example; {OPEN} {CLOSE} holds what bears loss:", example]
    console.print(Text("Training data", style="bold"))
    say("\n".join(lines), console)
