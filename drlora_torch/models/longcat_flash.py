"""LongCat Flash: the last experts return their input, so they look like sentinels to the kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.models.fused import GATE_UP_DOWN, Fused, Project, is_a, packed_routed, routed


def _run(module: Any, project: Project, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    gate, up = project("gate_up_proj", tokens, gather=True).chunk(2, dim=-1)
    output = project("down_proj", module.act_fn(gate) * up, routing_weights=weights)
    adapted = index < module.down_proj.shape[0]
    kept = weights.masked_fill(adapted, 0.0).sum(dim=-1, keepdim=True)
    return output + kept * tokens


LONGCAT_FLASH: Fused = Fused(
    name="identity experts",
    matches=is_a("transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts"),
    weights=lambda module: GATE_UP_DOWN,
    install_into=routed(_run),
    packed=packed_routed(lambda: LONGCAT_FLASH, _run),
    # gate_up_proj has rows for the identity experts too, which no token meets
    real=lambda module, by_expert: by_expert[: module.down_proj.shape[0]],
)
