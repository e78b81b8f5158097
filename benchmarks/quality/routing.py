"""Where a model's routers send the tokens of some rows: phi of each expert, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from drlora_torch import discover

Routing = dict[str, NDArray[np.float64]]
"""Routing weight per token of each expert, by layer name."""


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Routing:
    """Return phi of every expert over the tokens that ``attention_mask`` keeps.

    The model is left as it was. Only fused experts are seen, which are called with the chosen
    experts and their weights.
    """
    names = [layer.name for layer in discover(model)]
    sizes = {layer.name: layer.num_experts for layer in discover(model)}
    totals = {name: np.zeros(sizes[name]) for name in names}
    counted = dict.fromkeys(names, 0)
    kept = torch.empty(0, dtype=torch.bool)

    def follow(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            _, chosen, weights = (tensor.detach() for tensor in given)
            flat = torch.zeros(len(chosen), sizes[name], device=chosen.device)
            flat.scatter_add_(1, chosen, weights.float())
            totals[name] += flat[kept].sum(0).double().cpu().numpy()
            counted[name] += int(kept.sum())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(follow(name)) for name in names]
    was_training = model.training
    try:
        model.eval()
        for batch in batches:
            kept = batch["attention_mask"].flatten().bool()
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: totals[name] / max(1, counted[name]) for name in names}


def entropy(phi: NDArray[np.float64]) -> float:
    """Return the entropy of a layer's routing, 1 for an even use of all experts."""
    shares = phi[phi > 0] / phi.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(phi)))


def distance(first: Routing, second: Routing) -> float:
    """Return the total variation between two routings: 0 the same, 1 disjoint; mean of layers."""
    return float(
        np.mean(
            [
                0.5 * np.abs(phi / phi.sum() - second[name] / second[name].sum()).sum()
                for name, phi in first.items()
            ]
        )
    )
