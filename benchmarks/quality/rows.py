"""Tokenised rows of a task, and batches, which are the same for all methods of a seed.

Shape letters: B rows, T tokens of the longest row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.errors import StudyError

IGNORED = -100


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Tokens of prompt and completion; the completion begins at ``start``."""

    tokens: tuple[int, ...]
    start: int

    @property
    def completion_tokens(self) -> int:
        """Number of completion tokens."""
        return len(self.tokens) - self.start


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right; int64 [B, T] each."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor
    """``labels[:, t]`` is the token after position t; ``IGNORED`` outside completions."""

    @property
    def completion_tokens(self) -> int:
        """Number of completion tokens."""
        return int((self.labels != IGNORED).sum())


def encode(tokenizer: Any, rows: Sequence[Mapping[str, str]], max_tokens: int) -> list[Row]:
    """Tokenise prompt, completion and end-of-text token, truncated to ``max_tokens``.

    Rows whose prompt leaves no room for the completion are dropped.

    Raises:
        StudyError: no row is left.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        if end and prompt[-1:] == end:  # some tokenizers append it to every text
            prompt = prompt[:-1]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        tokens = (prompt + completion + end)[:max_tokens]
        start = max(len(prompt), 1)  # nothing predicts the first token
        if len(tokens) > start:
            encoded.append(Row(tuple(tokens), start))
    if not encoded:
        raise StudyError(
            f"no completion of {len(rows)} rows begins within {max_tokens} tokens; raise max_tokens"
        )
    return encoded


def collate(rows: Sequence[Row], padding: int, device: torch.device) -> Batch:
    """Pad rows on the right."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), length), padding, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for index, row in enumerate(rows):
        size = len(row.tokens)
        tokens[index, :size] = torch.tensor(row.tokens)
        mask[index, :size] = 1
        labels[index, row.start - 1 : size - 1] = tokens[index, row.start : size]
    return Batch(tokens.to(device), mask.to(device), labels.to(device))


def shuffled(num_rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Infinite stream of batches of row indices, epoch after epoch; deterministic.

    Example:
        >>> first = next(shuffled(num_rows=5, size=4, seed=0))
        >>> first == next(shuffled(num_rows=5, size=4, seed=0)), len(set(first))
        (True, 4)
    """
    generator = np.random.default_rng(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += generator.permutation(num_rows).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def in_order(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Batches with each row once, sorted by length."""
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    for first in range(0, len(by_length), size):
        yield by_length[first : first + size]
