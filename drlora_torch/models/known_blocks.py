"""Families of Transformers with per-expert Linears, declared as a user would declare them.

Shape letters: B batch, L length, T = B * L tokens, N experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from drlora_torch.models.declaration import Declaration, declare


def _one_hot_top_1(block: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Switch: one-hot [B, L, N], all 0 for a token above the capacity; probability [B, L, 1]."""
    chosen, probability, _ = output
    dropped = chosen.sum(dim=-1) == 0
    index = chosen.argmax(dim=-1).masked_fill(dropped, chosen.shape[-1])
    return index.reshape(-1, 1), probability.reshape(-1, 1)


def _mask_as_index(block: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """NLLB: the experts take the router's mask [T, N] of zeros and ones for expert indices.

    So expert 1 gets the first choice of every token and expert 0 the rest, whatever the router
    chose: a fault of Transformers, reported as it is, since statistics say what the block does.
    """
    mask, gates, _ = output
    return mask, gates


def _without_dropout(block: Any) -> list[nn.Module]:
    """NLLB keeps a Dropout among the experts."""
    return [block.experts[f"expert_{i}"] for i in range(block.num_experts)]


declare(
    Declaration(
        "transformers.models.switch_transformers.modeling_switch_transformers"
        ".SwitchTransformersSparseMLP",
        experts="experts",
        projections=("wi", "wo"),
        router="router",
        routing=_one_hot_top_1,
    )
)
declare(
    Declaration(
        "transformers.models.nllb_moe.modeling_nllb_moe.NllbMoeSparseMLP",
        experts=_without_dropout,
        projections=("fc1", "fc2"),
        router="router",
        routing=_mask_as_index,
    )
)
