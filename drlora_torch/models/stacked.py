"""Experts stacked in two dimensions: ``mlp.w1``, ``v1`` and ``w2``, [N * F, H] each.

w1 (gate) and v1 (up) are applied transposed, as a Linear's weight is; w2 as it stands. Hidden
states come and go in three dimensions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.dispatch import Dispatch
from drlora_torch.layers import ExpertLoRA
from drlora_torch.models.fused import RoutedConvention, compute_dtype
from drlora_torch.models.storage import ExpertParameter


class Stacked(RoutedConvention):
    """DBRX."""

    NAME = "stacked"
    CLASSES = ("transformers.models.dbrx.modeling_dbrx.DbrxExperts",)
    TRANSPOSED = {"w1": False, "v1": False, "w2": True}  # noqa: RUF012
    DIMS = 2

    def parameter(self, module: Any, projection: str) -> Any:
        """The weights are in the child ``mlp``."""
        return getattr(module.mlp, projection, None)

    def num_experts(self, module: Any) -> int:
        """N, which the shapes do not tell."""
        return int(module.num_experts)

    def stacked(self, module: Any, projection: str) -> Tensor:
        """See the base class: a view [N, F, H]."""
        weight: Tensor = getattr(module.mlp, projection)
        return weight.view(module.num_experts, module.ffn_hidden_size, module.hidden_size)

    def storage(self, module: Any, projection: str) -> ExpertParameter:
        """A parameter of the child, which the experts read and hand it expert by expert."""
        transposed = self.TRANSPOSED[projection]
        return ExpertParameter(
            module="mlp", name=projection, transposed=transposed, read_from_outside=True
        )

    def run(
        self, module: Any, lora: ExpertLoRA, tokens: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """See the base class."""
        dtype = compute_dtype(module.mlp.w1)
        dispatch = Dispatch.sort(index, lora.table.num_experts)
        inputs = tokens.to(dtype)
        gate = self.project(module, "w1", lora, inputs, dispatch, gather=True)
        up = self.project(module, "v1", lora, inputs, dispatch, gather=True)
        rows = (module.mlp.activation_fn(gate) * up).to(dtype)
        return self.project(module, "w2", lora, rows, dispatch, routing_weights=weights)
