"""Measurements of the base model on a task before training: routing, and gradients of the experts.

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

Arrays = Mapping[str, np.ndarray]
GRADIENT_ROWS = 512
"""Number of rows for gradients."""
DIMENSIONS = 4
"""Number of random directions for gradients: the rank of the LoRA."""


def routing_profile(model: nn.Module, rows: Sequence[Row], size: int, padding: int) -> Arrays:
    """Routing frequency phi [N] of every layer, over all tokens of the rows.

    The backward pass is there because routing counts only where one follows.
    """
    device = next(model.parameters()).device
    with _untrained(model, rank=1) as adapter:
        for part in in_order(rows, size):
            cross_entropy(*logits(model, collate(part, padding, device))).backward()
        adapter.step()
        return {name: adapter.engine.routing_frequency(name) for name in adapter.layers}


def gradient_profile(model: nn.Module, rows: Sequence[Row], size: int, padding: int) -> Arrays:
    """Mean |dL/dB| [N] of the experts of every layer before training, over the first rows.

    Sensitivity |B * dL/dB| is 0 before training, because B is 0. dL/dB is the gradient of the
    expert's weights projected on the random rows of A. Means over rank dimensions and batches, sum
    over projections.
    """
    device = next(model.parameters()).device
    batches = list(in_order(rows[:GRADIENT_ROWS], size))
    with _untrained(model, rank=DIMENSIONS) as adapter:
        found: dict[str, np.ndarray] = {}
        for part in batches:
            cross_entropy(*logits(model, collate(part, padding, device))).backward()
            for name, ranks in adapter.ranks().items():
                gradient = _gradient_of_B(adapter.layers[name].lora, len(ranks)) / len(batches)
                found[name] = found.get(name, 0.0) + gradient
            for parameter in adapter.parameters():
                parameter.grad = None
        return found


def _gradient_of_B(lora: nn.Module, experts: int) -> np.ndarray:
    """Mean |dL/dB| over the rank dimensions of each expert, summed over projections, [N]."""
    total = np.zeros(experts)
    for name, parameter in lora.named_parameters():
        if name.endswith("lora_B") and parameter.grad is not None:  # None if nothing was routed
            by_slot = parameter.grad.abs().mean(dim=1).double().cpu().numpy()
            total += by_slot.reshape(experts, DIMENSIONS).mean(axis=1)  # masked: expert by expert
    return total


@contextlib.contextmanager
def _untrained(model: nn.Module, rank: int) -> Iterator[drlora_torch.Adapter]:
    """Attach an adapter, which does not change the output of the model, in training mode."""
    config = AllocatorConfig(r_init=rank, r_target=rank, r_max=rank, policy="uniform")
    was_training = model.training
    adapter = drlora_torch.attach(model, AllocatorEngine(config), layout="masked", auto_step=False)
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
"""Measurements before training, by name."""
