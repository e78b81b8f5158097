"""Metrics of an allocation, logged beside the loss."""

from __future__ import annotations

import numpy as np

from drlora_torch.adapter import Adapter


def rank_metrics(adapter: Adapter) -> dict[str, float]:
    """Return the total rank, largest rank, mean entropy of the ranks, and skipped steps."""
    ranks = adapter.ranks().values()
    return {
        "total_rank": int(sum(layer.sum() for layer in ranks)),
        "max_rank": int(max(layer.max() for layer in ranks)),
        "rank_entropy": float(np.mean([rank_entropy(layer) for layer in ranks])),
        "skipped_steps": adapter.skipped_steps,
    }


def rank_entropy(ranks: np.ndarray) -> float:
    """Return the Shannon entropy of a layer's ranks, divided by that of equal ranks.

    It is 1 if all ranks (int array [N]) are equal and 0 if one expert has them all.

    Example:
        >>> rank_entropy(np.array([3, 3])), rank_entropy(np.array([6, 0]))
        (1.0, 0.0)
    """
    if ranks.size < 2 or not ranks.sum():
        return 1.0
    share = ranks[ranks > 0] / ranks.sum()
    return float(-(share * np.log(share)).sum() / np.log(ranks.size)) + 0.0
