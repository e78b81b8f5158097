"""Llama 4: the inputs of its experts are multiplied by the routing weights, for every expert.

The block repeats its tokens to [N * T, H], expert by expert, times a weight that is exactly 0
where the expert was not chosen; ``experts(inputs)`` is the whole call, and an expert of zeros
gives zeros. So only the chosen rows are computed here; outputs and gradients are the same. The
layer is the block, which holds the router: nothing else knows the routing.

Shape letters: T tokens, K experts per token, N experts, H model width, S = T * K.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from drlora_torch.errors import ModelError
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


def _install(convention: Fused, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
    last = threading.local()  # the routing of the router's last call in each thread

    def remember(router: Any, args: object, output: tuple[Tensor, Tensor]) -> None:
        scores, logits = output
        index = logits.topk(router.top_k, dim=1).indices  # as the router itself chose
        last.routing = index, scores.detach().gather(1, index)

    def forward(own: Forward, hidden_states: Tensor) -> Tensor:
        # [N * T, H]; rows that are not chosen give 0
        routing, last.routing = getattr(last, "routing", None), None
        if routing is None:
            raise ModelError(f"{lora.name}: its experts were called without their router")
        if lora.is_idle:
            output = lora.tie(own(hidden_states))
        else:
            output = chosen_rows(hidden_states, routing[0])
        observer.routed(lora, output, *routing)
        return output

    def chosen_rows(hidden_states: Tensor, index: Tensor) -> Tensor:
        dispatch = Dispatch.sort(index, lora.table.num_experts)
        project = convention.projector(module, lora, dispatch)
        chosen = index.reshape(-1)[dispatch.order] * index.shape[0] + dispatch.tokens  # [S]
        gate, up = project("gate_up_proj", hidden_states[chosen]).chunk(2, dim=-1)
        rows = project("down_proj", up * module.experts.act_fn(gate)).to(hidden_states.dtype)
        return torch.zeros_like(hidden_states).index_copy(0, chosen, rows)

    return undo_all(
        give_lora(module, lora, observer),
        run_instead(module.experts, forward, observer),
        module.router.register_forward_hook(remember).remove,
    )


def _run_packed(experts: Any, hidden_states: Tensor) -> Tensor:
    """Experts with packed weights on the inputs of all of them, [N * T, H]."""
    index = torch.arange(len(hidden_states), device=hidden_states.device)
    index = index // (len(hidden_states) // experts.num_experts)
    dispatch = Dispatch.sort(index.unsqueeze(1), experts.num_experts)
    gate, up = multiply_packed(experts, GATE_UP, hidden_states, dispatch).chunk(2, dim=-1)
    rows = multiply_packed(experts, DOWN, up * experts.act_fn(gate), dispatch)
    return rows.to(hidden_states.dtype)


GATE_UP, DOWN = (
    ExpertParameter(module="experts", name=name, transposed=True)
    for name in ("gate_up_proj", "down_proj")
)
LLAMA4 = Fused(
    name="weighted inputs",
    matches=is_a("transformers.models.llama4.modeling_llama4.Llama4TextMoe"),
    weights=lambda module: {each.name: each for each in (GATE_UP, DOWN)},
    install_into=_install,
    packed=packed_by_class({"experts": _run_packed}),
    router="router",
)
