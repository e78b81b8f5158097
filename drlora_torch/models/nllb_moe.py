"""NLLB-MoE: per-expert Linears, declared as a user would declare them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from drlora_torch.models.linears import PerExpertLinears


def _mask_as_index(block: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The experts take the router's mask [T, N] of zeros and ones for expert indices.

    So expert 1 gets the first choice of every token and expert 0 the rest, whatever the router
    chose: a fault of Transformers, reported as it is, since statistics say what the block does.
    """
    mask, gates, _ = output
    return mask, gates


def _without_dropout(block: Any) -> list[nn.Module]:
    """The experts; the block keeps a Dropout among them."""
    return [block.experts[f"expert_{i}"] for i in range(block.num_experts)]


BLOCK = "transformers.models.nllb_moe.modeling_nllb_moe.NllbMoeSparseMLP"
NLLB_MOE = PerExpertLinears(
    experts=_without_dropout, projections=("fc1", "fc2"), router="router", routing=_mask_as_index
)
