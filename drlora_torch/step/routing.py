"""The routing sample of a forward: phi's numerator and denominator.

Shape letters: T tokens, K experts per token, N experts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from drlora_torch.step.forwards import ModelCall


@dataclasses.dataclass(slots=True, eq=False)
class Routing:
    """The routing of one forward of a layer, kept until its backward pass arrives."""

    layer: str
    number: int
    """Place among all forwards of the adapter's layers."""
    top_k_index: Tensor  # integers [T, K]
    top_k_weights: Tensor  # [T, K]
    call: ModelCall | None


@torch.no_grad()
def sum_weights(
    top_k_index: Tensor, top_k_weights: Tensor, mask: Tensor | None, num_experts: int
) -> Tensor:
    """Sum the routing weights of each expert over the counted tokens, and count these.

    Indices >= N are sentinels and weigh nothing. ``mask`` tells which tokens count, bool [T]; None
    for all. Returns float64 [N + 1]: the sum of each expert, then the number of tokens.
    """
    weights = top_k_weights.double()
    if mask is not None:
        weights = weights.masked_fill(~mask.unsqueeze(-1), 0.0)  # padding may hold NaN
    # index_add_ neither waits for the device, as bincount does, nor breaks deterministic mode
    sums = weights.new_zeros(num_experts + 1)
    index = top_k_index.clamp(max=num_experts).reshape(-1)
    sums.index_add_(0, index, weights.reshape(-1))
    # the device fills a slice; a number for one element would be copied to it, which waits
    sums[num_experts:] = top_k_index.shape[0] if mask is None else mask.sum()
    return sums
