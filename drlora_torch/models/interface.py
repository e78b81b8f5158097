"""Experts modules that follow the experts interface of Transformers 5, adapted in one place.

The interface (``use_experts_implementation``) declares the layout by flags on the module:
``has_gate``, ``has_bias``, ``is_transposed``, ``has_post_expert_norm``. Its forward looks up
``config._experts_implementation`` in a public registry. We register one function there and give
each adapted module a private copy of its config that names it: the model's own config, its other
modules and other models are untouched, no forward is patched, no base parameter is renamed.

Shape letters: T tokens, K experts per token, H model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.convention import ATTACHMENT, Observer, Undo, give_lora
from drlora_torch.models.fused import Fused
from drlora_torch.models.location import ExpertParameter

IMPLEMENTATION = "drlora"
BASE_CONFIG = "_drlora_base_config"  # set on adapted modules beside their attachment


def _weights(module: Any) -> dict[str, ExpertParameter]:
    return {
        name: ExpertParameter(
            name=name,
            transposed=module.is_transposed,
            interleaved=not getattr(module, "is_concatenated", True),
        )
        for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    }


def _install(convention: Fused, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    base_config = module.config
    config = copy.deepcopy(base_config)
    config._experts_implementation = IMPLEMENTATION
    remove_lora = give_lora(module, lora, observer)
    vars(module)[BASE_CONFIG] = base_config
    module.config = config

    def remove() -> None:
        module.config = base_config
        del vars(module)[BASE_CONFIG]
        remove_lora()

    return remove


# It loops over experts and observes: a compiled model leaves its graph here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts with LoRA on tokens [T, H] and their routing [T, K]; gives [T, H].

    Transformers calls it instead of its eager or grouped experts.
    """
    lora, observer = vars(module)[ATTACHMENT]
    if not observer.enabled:
        own = type(module).forward.__wrapped__
        chosen = vars(module)[BASE_CONFIG]._experts_implementation
        base: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS.get_interface(chosen, own)
        return base(module, hidden_states, top_k_index, top_k_weights)
    first, second = INTERFACE.weights(module)
    bias_1, bias_2 = (
        getattr(module, f"{name}_bias") if module.has_bias else None for name in (first, second)
    )
    dispatch = Dispatch.sort(top_k_index, lora.table.num_experts)
    project = INTERFACE.projector(module, lora, dispatch)
    rows = project(first, hidden_states, bias_1, gather=True)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(project(second, rows, bias_2))
        output = dispatch.combine(rows, top_k_weights)
    else:
        output = project(second, rows, bias_2, routing_weights=top_k_weights)
    output = output.to(hidden_states.dtype)
    observer.routed(lora, output, top_k_index, top_k_weights)
    return output


INTERFACE = Fused(
    name="interface",
    matches=lambda module: {"is_transposed", "has_gate", "config"} <= vars(module).keys(),
    weights=_weights,
    install_into=_install,
)
