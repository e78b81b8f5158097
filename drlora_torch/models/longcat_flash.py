"""LongCat Flash: the last experts return their input, so there is nothing to adapt or to count.

``gate_up_proj`` has a row for them too, which no token meets; ``down_proj`` has none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.models.fused import Fused, Project, is_a, routed
from drlora_torch.models.location import ExpertParameter


def _run(module: Any, project: Project, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The identity experts look like sentinels to the kernel."""
    gate, up = project("gate_up_proj", tokens, gather=True).chunk(2, dim=-1)
    output = project("down_proj", module.act_fn(gate) * up, routing_weights=weights)
    adapted = index < module.down_proj.shape[0]
    kept = weights.masked_fill(adapted, 0.0).sum(dim=-1, keepdim=True)
    return output + kept * tokens


LONGCAT_FLASH = Fused(
    name="identity experts",
    matches=is_a("transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts"),
    weights=lambda module: {
        name: ExpertParameter(name=name, transposed=False) for name in ("gate_up_proj", "down_proj")
    },
    install_into=routed(_run),
    by_expert=lambda module, weight: weight[: module.down_proj.shape[0]],
)
