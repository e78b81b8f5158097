"""Experts of which the last ones return their input: nothing to adapt there, nothing to count.

``gate_up_proj`` has a row for them too, which no token meets; ``down_proj`` has none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.dispatch import Dispatch
from drlora_torch.layers import ExpertLoRA
from drlora_torch.models.fused import RoutedConvention, compute_dtype


class IdentityExperts(RoutedConvention):
    """LongCat Flash."""

    NAME = "identity experts"
    CLASSES = ("transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts",)
    TRANSPOSED = {"gate_up_proj": False, "down_proj": False}  # noqa: RUF012

    def stacked(self, module: Any, projection: str) -> Tensor:
        """Return the weights of the experts that have some."""
        weight: Tensor = getattr(module, projection)[: self.num_experts(module)]
        return weight

    def run(
        self, module: Any, lora: ExpertLoRA, tokens: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """See the base class; the identity experts look like sentinels to the kernel."""
        num_experts = lora.table.num_experts
        dtype = compute_dtype(module.gate_up_proj)
        dispatch = Dispatch.sort(index, num_experts)
        rows = self.project(module, "gate_up_proj", lora, tokens.to(dtype), dispatch, gather=True)
        gate, up = rows.chunk(2, dim=-1)
        rows = (module.act_fn(gate) * up).to(dtype)
        output = self.project(module, "down_proj", lora, rows, dispatch, routing_weights=weights)
        kept = weights.masked_fill(index < num_experts, 0.0).sum(dim=-1, keepdim=True)
        return output + kept * tokens
