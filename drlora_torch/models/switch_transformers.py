"""Switch Transformers: per-expert Linears, declared as a user would declare them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.models.linears import PerExpertLinears


def _one_hot_top_1(block: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One-hot [batch, length, N], all 0 above the capacity; probability [batch, length, 1]."""
    chosen, probability, _ = output
    dropped = chosen.sum(dim=-1) == 0
    index = chosen.argmax(dim=-1).masked_fill(dropped, chosen.shape[-1])
    return index.reshape(-1, 1), probability.reshape(-1, 1)


BLOCK = (
    "transformers.models.switch_transformers.modeling_switch_transformers"
    ".SwitchTransformersSparseMLP"
)
SWITCH_TRANSFORMERS = PerExpertLinears(
    experts="experts", projections=("wi", "wo"), router="router", routing=_one_hot_top_1
)
