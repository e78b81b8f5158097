"""Blocks with one module per projection of all experts, called with rows sorted by expert.

``input_linear(rows, counts)`` and ``output_linear(rows, counts)``, ``weight`` [N, O, I]. The layer
is the block, which holds the router too: that of the MLP, and on request that of routed attention,
whose experts project queries and outputs.

Shape letters: T tokens, K experts per token, N experts, S = T * K (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drlora_torch.dispatch import Dispatch
from drlora_torch.layers import ExpertLoRA
from drlora_torch.models.convention import Observer
from drlora_torch.models.fused import (
    FusedConvention,
    all_of,
    compute_dtype,
    give_lora,
    is_of_class,
    run_instead,
)
from drlora_torch.models.storage import ExpertParameter

ATTENTION = "transformers.models.jetmoe.modeling_jetmoe.JetMoeMoA"


class SingleProjections(FusedConvention):
    """JetMoE."""

    NAME = "single projections"
    CLASSES = (
        "transformers.models.jetmoe.modeling_jetmoe.JetMoeMoE",
        ATTENTION,
    )
    TRANSPOSED = {"input_linear": False, "output_linear": False}  # noqa: RUF012

    def parameter(self, module: Any, projection: str) -> Any:
        """Each projection is a child with one ``weight``."""
        return getattr(getattr(module, projection), "weight", None)

    def storage(self, module: Any, projection: str) -> ExpertParameter:
        """The parameter of that child."""
        transposed = self.TRANSPOSED[projection]
        return ExpertParameter(module=projection, name="weight", transposed=transposed)

    def router_child(self, module: Any) -> str | None:
        """The block holds its router."""
        return "router"

    def only_on_request(self, module: Any) -> bool:
        """Attention is left alone unless it is asked for."""
        return is_of_class(module, (ATTENTION,))

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
        """Give the block its LoRA, its projections a forward, its router a hook."""

        def routed(router: Any, args: object, output: Any) -> None:
            if observer.enabled:
                observer.routed(lora.name, *_routing(output))

        removals = [
            give_lora(module, lora, observer),
            module.router.register_forward_hook(routed).remove,
        ]
        for projection in self.TRANSPOSED:
            child = getattr(module, projection)
            forward = self._forward(module, projection, lora)
            removals.append(run_instead(child, forward, observer))
        return all_of(removals)

    def _forward(self, module: Any, projection: str, lora: ExpertLoRA) -> Callable[..., Tensor]:
        def forward(inputs: Tensor, expert_size: list[int]) -> Tensor:
            rows = inputs.to(compute_dtype(getattr(module, projection).weight))
            experts = _experts(expert_size, inputs.device)
            dispatch = Dispatch.sort(experts.unsqueeze(1), lora.table.num_experts)
            return self.project(module, projection, lora, rows, dispatch)

        return forward


def _experts(counts: list[int], device: torch.device) -> Tensor:
    """Expert of each sorted row, int64 [S]."""
    numbers = torch.tensor(counts, device=device)
    return torch.repeat_interleave(torch.arange(len(counts), device=device), numbers)


def _routing(output: Any) -> tuple[Tensor, Tensor]:
    """Index and weights [T, K] from what the router gives: pairs sorted by expert."""
    order, _, gates, counts, logits = output
    index = torch.empty_like(order)
    index[order] = _experts(counts, order.device)
    weights = torch.empty_like(gates)
    weights[order] = gates.detach()
    return index.view(logits.shape[0], -1), weights.view(logits.shape[0], -1)
