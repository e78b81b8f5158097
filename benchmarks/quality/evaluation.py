"""Loss and exact match of a model on held-out rows.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.quality.rows import IGNORED, Batch, Row, collate, in_order


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """Results on one split."""

    loss: float
    """Mean over all completion tokens, in nats; not finite if training diverged."""
    exact_match: float
    """Share of rows that greedy decoding would complete correctly: every completion token is the
    most likely one given the correct tokens before it."""


def logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [tokens, V], float32, and labels [tokens] of the completion tokens."""
    output = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    counted = batch.labels != IGNORED
    return output.logits[counted].float(), batch.labels[counted]


@torch.no_grad()
def evaluate(model: nn.Module, rows: Sequence[Row], size: int, padding: int) -> Evaluation:
    """Evaluate on a split; restores the mode of the model."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, exact, tokens = 0.0, 0, 0
    for part in in_order(rows, size):
        batch = collate(part, padding, device)
        predicted, labels = logits(model, batch)
        total += float(cross_entropy(predicted, labels, reduction="sum"))
        tokens += labels.numel()
        wrong = torch.zeros_like(batch.labels, dtype=torch.bool)
        wrong[batch.labels != IGNORED] = predicted.argmax(-1) != labels
        exact += int((~wrong.any(dim=1)).sum())
    model.train(was_training)
    return Evaluation(total / tokens, exact / len(rows))
