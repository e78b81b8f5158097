"""Families of fused experts that are handed their routing, as the experts interface hands it.

Shape letters: N experts, I input features of ``down_proj``, H model width, F features of an expert.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.models.fused import Fused, Project, compute_dtype, is_a, routed
from drlora_torch.models.location import ExpertParameter

GATE_UP_DOWN = {
    name: ExpertParameter(name=name, transposed=False) for name in ("gate_up_proj", "down_proj")
}
"""``gate_up_proj`` [N, 2I, H] and ``down_proj`` [N, H, I]."""


def _step3p7(
    module: Any, project: Project, tokens: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Experts as the interface has them, whose class does not take part in it."""
    rows = module._apply_gate(project("gate_up_proj", tokens, gather=True))
    return project("down_proj", rows, routing_weights=weights)


STEP3P7 = Fused(
    name="undecorated",
    matches=is_a("transformers.models.step3p7.modeling_step3p7.Step3p7Experts"),
    weights=lambda module: GATE_UP_DOWN,
    install_into=routed(_step3p7),
)


def _longcat_flash(
    module: Any, project: Project, tokens: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """The last experts return their input; they look like sentinels to the kernel."""
    gate, up = project("gate_up_proj", tokens, gather=True).chunk(2, dim=-1)
    output = project("down_proj", module.act_fn(gate) * up, routing_weights=weights)
    adapted = index < module.down_proj.shape[0]
    kept = weights.masked_fill(adapted, 0.0).sum(dim=-1, keepdim=True)
    return output + kept * tokens


LONGCAT_FLASH = Fused(
    name="identity experts",
    matches=is_a("transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts"),
    weights=lambda module: GATE_UP_DOWN,
    install_into=routed(_longcat_flash),
    # gate_up_proj has rows for the identity experts too, which no token meets
    by_expert=lambda module, weight: weight[: module.down_proj.shape[0]],
)


def _dbrx(module: Any, project: Project, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``w1`` (gate), ``v1`` (up) and ``w2`` are [N * F, H]; only w2 is applied as it stands.

    The experts read the parameters of their child ``mlp`` and hand it those of one expert.
    """
    tokens = tokens.to(compute_dtype(module.mlp.w1))  # once for two projections
    gate = project("w1", tokens, gather=True)
    up = project("v1", tokens, gather=True)
    return project("w2", module.mlp.activation_fn(gate) * up, routing_weights=weights)


DBRX = Fused(
    name="stacked",
    matches=is_a("transformers.models.dbrx.modeling_dbrx.DbrxExperts"),
    weights=lambda module: {
        name: ExpertParameter(
            module="mlp", name=name, transposed=name == "w2", read_from_outside=True
        )
        for name in ("w1", "v1", "w2")
    },
    install_into=routed(_dbrx),
    dims=2,
    by_expert=lambda module, weight: weight.view(module.num_experts, -1, weight.shape[-1]),
)
