"""DBRX: ``w1`` (gate), ``v1`` (up) and ``w2`` are [N * F, H]; only w2 is applied as it stands.

The experts read the parameters of their child ``mlp`` and hand it those of one expert.

Shape letters: N experts, F features of an expert, H model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.models.fused import Fused, Project, compute_dtype, is_a, packed_routed, routed
from drlora_torch.models.location import ExpertParameter


def _run(module: Any, project: Project, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    tokens = tokens.to(compute_dtype(DBRX.stored(module, "w1"), tokens))  # once for two
    gate = project("w1", tokens, gather=True)
    up = project("v1", tokens, gather=True)
    return project("w2", module.mlp.activation_fn(gate) * up, routing_weights=weights)


DBRX: Fused = Fused(
    name="stacked",
    matches=is_a("transformers.models.dbrx.modeling_dbrx.DbrxExperts"),
    weights=lambda module: {
        name: ExpertParameter(
            module="mlp", name=name, transposed=name == "w2", read_from_outside=True
        )
        for name in ("w1", "v1", "w2")
    },
    install_into=routed(_run),
    packed=packed_routed(lambda: DBRX, _run),
    dims=2,
    by_expert=lambda module, weight: weight.view(module.num_experts, -1, weight.shape[-1]),
)
