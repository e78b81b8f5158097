"""Experts shaped and called as the interface says, whose class does not take part in it.

``gate_up_proj`` [N, 2I, H] and ``down_proj`` [N, H, I]; ``_apply_gate`` is the module's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.dispatch import Dispatch
from drlora_torch.layers import ExpertLoRA
from drlora_torch.models.fused import RoutedConvention, compute_dtype


class Undecorated(RoutedConvention):
    """Step 3.7."""

    NAME = "undecorated"
    CLASSES = ("transformers.models.step3p7.modeling_step3p7.Step3p7Experts",)
    TRANSPOSED = {"gate_up_proj": False, "down_proj": False}  # noqa: RUF012

    def run(
        self, module: Any, lora: ExpertLoRA, tokens: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """See the base class."""
        dtype = compute_dtype(module.gate_up_proj)
        dispatch = Dispatch.sort(index, lora.table.num_experts)
        rows = self.project(module, "gate_up_proj", lora, tokens.to(dtype), dispatch, gather=True)
        rows = module._apply_gate(rows).to(dtype)
        return self.project(module, "down_proj", lora, rows, dispatch, routing_weights=weights)
