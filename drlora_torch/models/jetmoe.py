"""JetMoE: one module per projection of all experts, called with rows sorted by expert.

``input_linear(rows, counts)`` and ``output_linear(rows, counts)``, ``weight`` [N, O, I]. The layer
is the block, which holds the router: that of the MLP, and on request that of routed attention,
whose experts project queries and outputs.

Shape letters: T tokens, K experts per token, N experts, S = T * K (token, expert) pairs.
"""

from __future__ import annotations

import dataclasses
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.convention import Observer, Undo, give_lora, undo_all
from drlora_torch.models.fused import (
    Forward,
    Fused,
    is_a,
    multiply_packed,
    packed_by_class,
    run_instead,
)
from drlora_torch.models.location import ExpertParameter

FIRST, LAST = "input_linear", "output_linear"


def _install(convention: Fused, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
    last = threading.local()  # the routing of the router's last call in each thread

    def remember(router: Any, args: object, output: Any) -> None:
        last.routing = _routing(output)

    def forward(projection: str, own: Forward, inputs: Tensor, expert_size: list[int]) -> Tensor:
        if lora.is_idle:
            output = lora.tie(own(inputs, expert_size))
        else:
            experts = _experts(expert_size, inputs.device)
            dispatch = Dispatch.sort(experts.unsqueeze(1), lora.table.num_experts)
            output = convention.projector(module, lora, dispatch)(projection, inputs)
        if projection == LAST:
            observer.routed(lora, output, *last.routing)
        return output

    return undo_all(
        give_lora(module, lora, observer),
        module.router.register_forward_hook(remember).remove,
        run_instead(module.input_linear, partial(forward, FIRST), observer),
        run_instead(module.output_linear, partial(forward, LAST), observer),
    )


def _experts(counts: list[int], device: torch.device) -> Tensor:
    """Expert of each sorted row, int64 [S]."""
    return torch.repeat_interleave(torch.tensor(counts, device=device))


def _routing(output: Any) -> tuple[Tensor, Tensor]:
    """Index and weights [T, K] from what the router gives: pairs sorted by expert."""
    order, _, gates, counts, logits = output
    index = torch.empty_like(order)
    index[order] = _experts(counts, order.device)
    weights = torch.empty_like(gates)
    weights[order] = gates.detach()
    return index.view(logits.shape[0], -1), weights.view(logits.shape[0], -1)


def _run_packed(projection: Any, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """A projection whose weights are packed."""
    experts = _experts(expert_size, inputs.device)
    dispatch = Dispatch.sort(experts.unsqueeze(1), len(expert_size))
    where = ExpertParameter(name="weight", transposed=False)
    return multiply_packed(projection, where, inputs, dispatch).to(inputs.dtype)


JETMOE = Fused(
    name="single projections",
    matches=is_a("transformers.models.jetmoe.modeling_jetmoe.JetMoeMoE"),
    weights=lambda module: {
        projection: ExpertParameter(module=projection, name="weight", transposed=False)
        for projection in (FIRST, LAST)
    },
    install_into=_install,
    packed=packed_by_class({FIRST: _run_packed, LAST: _run_packed}),
    router="router",
)
JETMOE_ATTENTION = dataclasses.replace(
    JETMOE,
    matches=is_a("transformers.models.jetmoe.modeling_jetmoe.JetMoeMoA"),
    only_on_request=True,
)
