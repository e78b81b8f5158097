"""Held-out loss and exact match of a model.

Shape letters: B rows, T tokens of the longest of them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from drlora_torch.finetune.after.held_out import Question
from drlora_torch.finetune.after.texts import Sampling, generate
from drlora_torch.finetune.data.encode import NO_LOSS, Encoded

MARGIN = 8
"""Tokens that an answer may be longer than the right one; the texts are compared in the end."""
Progress = Callable[[int], None]
"""Is told how many rows are done."""


class Loss(NamedTuple):
    """Sum over the tokens of all rows that bear loss."""

    total: float
    """In nats."""
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean; infinite where that is too large for a number."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


@torch.no_grad()
def measure_loss(model: Any, rows: Sequence[Encoded], batch_size: int, done: Progress) -> Loss:
    """Return the loss of a model, without the balancing loss of its routers.

    Args:
        model: of Transformers, in evaluation mode.
        rows: their tokens and labels.
        batch_size: rows of a forward pass; the result does not depend on it.
        done: is told how many rows are done.
    """
    total, tokens = 0.0, 0
    for batch in _batches(rows, batch_size, key=lambda row: len(row.input_ids)):
        ids = _pad([row.input_ids for row in batch], 0).to(model.device)  # [B, T]
        mask = _pad([[1] * len(row.input_ids) for row in batch], 0).to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, T, V]
        for row, own in zip(batch, logits, strict=True):  # one at a time: float32 needs memory
            labels = torch.tensor(row.labels[1:], device=own.device)
            scores = own[: len(labels)].float()
            total += float(cross_entropy(scores, labels, ignore_index=NO_LOSS, reduction="sum"))
            tokens += int((labels != NO_LOSS).sum())
        done(len(batch))
    return Loss(total, tokens)


def measure_matches(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    stop: Sequence[int],
    batch_size: int,
    done: Progress,
) -> int:
    """Return how many answers the model gives word by word, with the likeliest token each time.

    Args:
        model: of Transformers.
        tokenizer: of the model.
        asked: prompts and their right answers; space around those does not count.
        stop: tokens that end an answer.
        batch_size: prompts at a time.
        done: is told how many rows are done.
    """
    right = 0
    for batch in _batches(asked, batch_size, key=lambda one: one.tokens):
        longest = Sampling(max_new_tokens=batch[0].tokens + MARGIN)
        texts = generate(model, tokenizer, [one.prompt for one in batch], longest, stop)
        right += sum(text.strip() == one.answer for text, one in zip(texts, batch, strict=True))
        done(len(batch))
    return right


def _batches(rows: Sequence[Any], size: int, key: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Yield rows of about the same length together, the longest first."""
    ordered = sorted(rows, key=key, reverse=True)
    yield from (ordered[start : start + size] for start in range(0, len(ordered), size))


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
