"""What is measured on a model: loss and exact match of held-out rows, and routing before training.

Shape letters: B rows, T tokens, V vocabulary, N experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import drlora_torch
from benchmarks.quality.adapting import Arrays
from benchmarks.quality.rows import IGNORED, Batch, Row, collate, in_order
from drlora_core import AllocatorConfig, AllocatorEngine


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of a split."""

    loss: float
    """Mean over all completion tokens, in nats; not finite if the model is broken."""
    exact_match: float
    """Share of rows whose every completion token is the most likely one: with the tokens before
    it given, which is what greedy decoding would write."""


def logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [tokens, V], float32, and labels [tokens] at the positions that the loss is on."""
    output = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    counted = batch.labels != IGNORED
    return output.logits[counted].float(), batch.labels[counted]


@torch.no_grad()
def evaluate(model: nn.Module, rows: Sequence[Row], size: int, padding: int) -> Evaluation:
    """Measure a split; the model is left in the mode it came in."""
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


def profile(model: nn.Module, rows: Sequence[Row], size: int, padding: int) -> Arrays:
    """Routing frequency phi [N] of every layer, over all tokens of the rows: one forward pass.

    An adapter that is not trained counts them (a new one changes nothing that the model computes).
    """
    config = AllocatorConfig(r_init=1, r_target=1, r_max=1, policy="uniform")
    device = next(model.parameters()).device
    adapter = drlora_torch.attach(model, AllocatorEngine(config), auto_step=False)
    was_training = model.training
    model.train()
    try:
        for part in in_order(rows, size):
            logits(model, collate(part, padding, device))
        adapter.step()
        return {name: adapter.engine.routing_frequency(name) for name in adapter.layers}
    finally:
        model.train(was_training)
        adapter.detach()
