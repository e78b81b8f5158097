"""Experts modules that follow the experts interface of Transformers 5, adapted in one place.

The interface (``use_experts_implementation``) declares the layout by flags on the module:
``has_gate``, ``has_bias``, ``is_transposed``, ``has_post_expert_norm``. Its forward looks up
``config._experts_implementation`` in a public registry. We register one function there and give
each adapted module a private copy of its config that names it: the model's own config, its other
modules and other models are untouched, no forward is patched, no base parameter is renamed.

Shape letters: T tokens, K experts per token, H model width, N experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import expert_linear
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.models.convention import ATTACHMENT, Observer, Undo, give_lora, weights_obstacle
from drlora_torch.models.fused import compute_dtype
from drlora_torch.models.location import ExpertParameter

IMPLEMENTATION = "drlora"
BASE_CONFIG = "_drlora_base_config"  # set on adapted modules beside their attachment


class ExpertsInterface:
    """The convention of every class decorated with ``use_experts_implementation``."""

    name = "interface"
    router = None  # the interface hands experts their routing; the router is elsewhere
    only_on_request = False

    def matches(self, module: nn.Module) -> bool:
        return {"is_transposed", "has_gate", "config"} <= vars(module).keys()

    def num_experts(self, module: Any) -> int:
        weight = self.first_weight(module)
        return 0 if weight is None else len(weight)

    def first_weight(self, module: Any) -> Tensor | None:
        return getattr(module, projection_names(module)[0], None)

    def projection_shapes(self, module: Any) -> dict[str, ProjectionShape]:
        order = 1 if module.is_transposed else -1  # of [N, I, O], else [N, O, I]
        weights = {name: getattr(module, name) for name in projection_names(module)}
        return {name: ProjectionShape(*w.shape[1:][::order]) for name, w in weights.items()}

    def obstacle(self, module: Any) -> str | None:
        weights: dict[str, Any] = {n: getattr(module, n, None) for n in projection_names(module)}
        if (obstacle := weights_obstacle(weights, dims=3)) is not None:
            return obstacle
        first, second = (len(weight) for weight in weights.values())
        return None if first == second else f"its projections have {first} and {second} experts"

    def expert_weight(self, module: Any, projection: str, expert: int) -> Tensor:
        weight: Tensor = getattr(module, projection)[expert]
        return weight.T if module.is_transposed else weight

    def location(self, module: Any, projection: str) -> ExpertParameter:
        return ExpertParameter(
            name=projection,
            transposed=module.is_transposed,
            interleaved=not getattr(module, "is_concatenated", True),
        )

    def install(self, module: Any, lora: ExpertLoRA, observer: Observer) -> Undo:
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


def projection_names(module: Any) -> tuple[str, str]:
    """Return the weights of an expert in the order they are applied."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


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
    first, second = projection_names(module)
    dtype = compute_dtype(getattr(module, first))
    dispatch = Dispatch.sort(top_k_index, lora.table.num_experts)

    def project(name: str, inputs: Tensor, **options: Any) -> Tensor:
        return expert_linear(
            inputs.to(dtype),
            getattr(module, name),
            getattr(module, f"{name}_bias") if module.has_bias else None,
            lora.factors(name),
            dispatch,
            transposed=module.is_transposed,
            **options,
        )

    rows = project(first, hidden_states, gather=True)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    if module.has_post_expert_norm:
        output = dispatch.combine(module.post_expert_norm(project(second, rows)), top_k_weights)
    else:
        output = project(second, rows, routing_weights=top_k_weights)
    output = output.to(hidden_states.dtype)
    observer.routed(lora, output, top_k_index, top_k_weights)
    return output
