"""LongCat Flash: the last experts return their input, so there is nothing to adapt or to count.

``gate_up_proj`` has a row for them too, which no token meets; ``down_proj`` has none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.fused import Fused, routed
from drlora_torch.models.location import ExpertParameter


def _with_weights(module: Any, weight: Tensor) -> Tensor:
    """The weights of the experts that have some."""
    experts: Tensor = weight[: module.down_proj.shape[0]]
    return experts


def _run(
    convention: Fused, module: Any, lora: ExpertLoRA, tokens: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """The identity experts look like sentinels to the kernel."""
    num_experts = lora.table.num_experts
    dtype = convention.compute_dtype(module)
    dispatch = Dispatch.sort(index, num_experts)
    rows = convention.project(module, "gate_up_proj", lora, tokens.to(dtype), dispatch, gather=True)
    gate, up = rows.chunk(2, dim=-1)
    rows = (module.act_fn(gate) * up).to(dtype)
    output = convention.project(module, "down_proj", lora, rows, dispatch, routing_weights=weights)
    kept = weights.masked_fill(index < num_experts, 0.0).sum(dim=-1, keepdim=True)
    return output + kept * tokens


LONGCAT_FLASH = Fused(
    name="identity experts",
    classes=("transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts",),
    weights={
        "gate_up_proj": ExpertParameter(name="gate_up_proj", transposed=False),
        "down_proj": ExpertParameter(name="down_proj", transposed=False),
    },
    install_into=routed(_run),
    by_expert=_with_weights,
)
