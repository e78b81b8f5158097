"""DBRX: experts stacked in two dimensions, ``mlp.w1``, ``v1`` and ``w2``, [N * F, H] each.

w1 (gate) and v1 (up) are applied transposed, as a Linear's weight is; w2 as it stands. Hidden
states come and go in three dimensions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.fused import Fused, routed
from drlora_torch.models.location import ExpertParameter


def _count(module: Any, weight: Tensor) -> int:
    return int(module.num_experts)


def _by_expert(module: Any, weight: Tensor) -> Tensor:
    """View [N * F, H] as [N, F, H]."""
    return weight.view(module.num_experts, module.ffn_hidden_size, module.hidden_size)


def _run(
    convention: Fused, module: Any, lora: ExpertLoRA, tokens: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    dtype = convention.compute_dtype(module)
    dispatch = Dispatch.sort(index, lora.table.num_experts)
    inputs = tokens.to(dtype)
    gate = convention.project(module, "w1", lora, inputs, dispatch, gather=True)
    up = convention.project(module, "v1", lora, inputs, dispatch, gather=True)
    rows = (module.mlp.activation_fn(gate) * up).to(dtype)
    return convention.project(module, "w2", lora, rows, dispatch, routing_weights=weights)


def _weight(name: str, transposed: bool) -> ExpertParameter:
    """A parameter of the child ``mlp``, which the experts read and hand it expert by expert."""
    return ExpertParameter(module="mlp", name=name, transposed=transposed, read_from_outside=True)


DBRX = Fused(
    name="stacked",
    classes=("transformers.models.dbrx.modeling_dbrx.DbrxExperts",),
    weights={
        "w1": _weight("w1", transposed=False),
        "v1": _weight("v1", transposed=False),
        "w2": _weight("w2", transposed=True),
    },
    install_into=routed(_run),
    dims=2,
    count=_count,
    by_expert=_by_expert,
)
