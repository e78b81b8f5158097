"""Step 3.7: experts as the experts interface has them, whose class does not take part in it.

``gate_up_proj`` [N, 2I, H] and ``down_proj`` [N, H, I]; ``_apply_gate`` is the module's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.fused import Fused, routed
from drlora_torch.models.location import ExpertParameter


def _run(
    convention: Fused, module: Any, lora: ExpertLoRA, tokens: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    dtype = convention.compute_dtype(module)
    dispatch = Dispatch.sort(index, lora.table.num_experts)
    rows = convention.project(module, "gate_up_proj", lora, tokens.to(dtype), dispatch, gather=True)
    rows = module._apply_gate(rows).to(dtype)
    return convention.project(module, "down_proj", lora, rows, dispatch, routing_weights=weights)


STEP3P7 = Fused(
    name="undecorated",
    classes=("transformers.models.step3p7.modeling_step3p7.Step3p7Experts",),
    weights={
        "gate_up_proj": ExpertParameter(name="gate_up_proj", transposed=False),
        "down_proj": ExpertParameter(name="down_proj", transposed=False),
    },
    install_into=routed(_run),
)
