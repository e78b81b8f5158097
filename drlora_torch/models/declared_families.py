"""Families with per-expert Linears, declared as a user would declare them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from drlora_torch.models.linears import PerExpertLinears


def _one_hot_top_1(block: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One-hot [batch, length, N], all 0 above the capacity; probability [batch, length, 1]."""
    chosen, probability, _ = output
    dropped = chosen.sum(dim=-1) == 0
    index = chosen.argmax(dim=-1).masked_fill(dropped, chosen.shape[-1])
    return index.reshape(-1, 1), probability.reshape(-1, 1)


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


_HF = "transformers.models"
_SWITCH = PerExpertLinears(
    experts="experts", projections=("wi", "wo"), router="router", routing=_one_hot_top_1
)
_NLLB = PerExpertLinears(
    experts=_without_dropout, projections=("fc1", "fc2"), router="router", routing=_mask_as_index
)
FAMILIES = {
    f"{_HF}.switch_transformers.modeling_switch_transformers.SwitchTransformersSparseMLP": _SWITCH,
    f"{_HF}.nllb_moe.modeling_nllb_moe.NllbMoeSparseMLP": _NLLB,
}
"""By the dotted name of their block, which need not be imported."""
