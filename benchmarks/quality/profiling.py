"""What a base model says about a task before it is trained: routing, and gradients of the experts.

Shape letters: N experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from torch import nn
from torch.nn.functional import cross_entropy

import drlora_torch
from benchmarks.quality.evaluation import logits
from benchmarks.quality.rows import Row, collate, in_order
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.adapter import Adapter
from drlora_torch.layers import ExpertLoRA

Arrays = Mapping[str, np.ndarray]
GRADIENT_ROWS = 512
"""Rows that gradients are measured on; a backward pass costs twice a forward one."""
DIMENSIONS = 4
"""Random directions that gradients are measured in."""


def routing_profile(model: nn.Module, rows: Sequence[Row], size: int, padding: int) -> Arrays:
    """Routing frequency phi [N] of every layer, over all tokens of the rows: one forward pass.

    An adapter that is not trained counts them (a new one changes nothing that the model computes).
    """
    device = next(model.parameters()).device
    with _untrained(model, rank=1) as adapter:
        for part in in_order(rows, size):
            logits(model, collate(part, padding, device))
        adapter.step()
        return {name: adapter.engine.routing_frequency(name) for name in adapter.layers}


def gradient_profile(model: nn.Module, rows: Sequence[Row], size: int, padding: int) -> Arrays:
    """Mean |dL/dB| [N] of every layer's experts at the start of training, over the first rows.

    B is 0 there, so the sensitivity |B * dL/dB| is too; dL/dB itself is the gradient of the
    expert's weights in the random directions of A. Means over rank dimensions and batches, sums
    over projections.
    """
    device = next(model.parameters()).device
    batches = list(in_order(rows[:GRADIENT_ROWS], size))
    with _untrained(model, rank=DIMENSIONS) as adapter:
        loras = {name: layer.lora for name, layer in adapter.layers.items()}
        found = {name: np.zeros(lora.table.num_experts) for name, lora in loras.items()}
        for part in batches:
            cross_entropy(*logits(model, collate(part, padding, device))).backward()
            for name, lora in loras.items():
                found[name] += _gradient_of_B(lora) / len(batches)
            for parameter in adapter.parameters():
                parameter.grad = None
        return found


def _gradient_of_B(lora: ExpertLoRA) -> np.ndarray:
    """Mean |dL/dB| over each expert's rank dimensions, summed over projections, [N]."""
    total = np.zeros(lora.table.num_experts)
    for _, projection in lora.items():
        grad = projection.lora_B.grad
        if grad is not None:  # none where nothing was routed
            by_slot = grad.abs().mean(dim=1).double().cpu().numpy()
            total += lora.table.per_dimension(by_slot).sum(axis=1) / lora.table.ranks()
    return total


@contextlib.contextmanager
def _untrained(model: nn.Module, rank: int) -> Iterator[Adapter]:
    """Inside, the model has an adapter and is in training mode; then it is as it was."""
    config = AllocatorConfig(r_init=rank, r_target=rank, r_max=rank, policy="uniform")
    was_training = model.training
    adapter = drlora_torch.attach(model, AllocatorEngine(config), auto_step=False)
    model.train()
    try:
        yield adapter
    finally:
        model.train(was_training)
        adapter.detach()


PROFILES: Mapping[str, Callable[[nn.Module, Sequence[Row], int, int], Arrays]] = {
    "routing": routing_profile,
    "gradient": gradient_profile,
}
"""What may be measured before training, by name."""
