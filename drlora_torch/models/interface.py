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
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from drlora_torch.dispatch import Dispatch
from drlora_torch.kernels import expert_linear
from drlora_torch.layers import ExpertLoRA, ProjectionShape

IMPLEMENTATION = "drlora"
CHILD = "drlora"  # name of the ExpertLoRA in the experts module
ATTACHMENT = "_drlora_attachment"


class Observer(Protocol):
    """Told of every routing decision that an adapted experts module gets."""

    def routed(self, name: str, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Take the routing of one forward, [T, K] each."""
        ...

    @property
    def enabled(self) -> bool:
        """False while the base model is wanted."""
        ...


def is_attached(module: nn.Module) -> bool:
    """True for an experts module that carries a LoRA."""
    return ATTACHMENT in vars(module)


@torch.no_grad()
def add_delta(module: Any, projection: str, lora: ExpertLoRA) -> None:
    """Write W + s B A into the weights of one projection, expert by expert."""
    weight = getattr(module, projection)
    for expert in range(lora.table.num_experts):
        delta = lora.delta_weight(projection, expert).to(weight.device)
        target = weight.data[expert]
        target.copy_(target.to(delta.dtype) + (delta.T if module.is_transposed else delta))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Attachment:
    """What an adapted experts module needs at its forward."""

    lora: ExpertLoRA
    observer: Observer
    base_config: Any


def follows_interface(module: nn.Module) -> bool:
    """True for classes decorated with ``use_experts_implementation``."""
    declared = vars(module)
    return "is_transposed" in declared and "has_gate" in declared and "config" in declared


def projection_names(module: Any) -> tuple[str, str]:
    """Return the weights of an expert in the order they are applied."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def projection_shapes(module: Any) -> dict[str, ProjectionShape]:
    """Return the features of each projection, read from the weight by the declared axes."""
    shapes = {}
    for name in projection_names(module):
        _, rows, columns = getattr(module, name).shape
        shapes[name] = (
            ProjectionShape(rows, columns)
            if module.is_transposed
            else ProjectionShape(columns, rows)
        )
    return shapes


def obstacle(module: Any) -> str | None:
    """Say why a module with the interface cannot be adapted, None if it can."""
    weights = [getattr(module, name, None) for name in projection_names(module)]
    for name, weight in zip(projection_names(module), weights, strict=True):
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return f"its {name} is not a 3-D tensor"
        if weight.is_meta:
            return f"its {name} is on the meta device; load the weights first"
        if not weight.is_floating_point() or weight.element_size() == 1:
            kind = str(weight.dtype).removeprefix("torch.")
            return f"its {name} is quantised ({kind}); load the model in a floating-point dtype"
    first, second = (weight.shape[0] for weight in weights if weight is not None)
    if first != second:
        return f"its projections have {first} and {second} experts"
    return None


def install(module: Any, lora: ExpertLoRA, observer: Observer) -> Callable[[], None]:
    """Give an experts module its LoRA; return the function that takes it back out exactly."""
    base_config = module.config
    config = copy.deepcopy(base_config)
    config._experts_implementation = IMPLEMENTATION
    module.add_module(CHILD, lora)
    vars(module)[ATTACHMENT] = Attachment(lora, observer, base_config)
    module.config = config

    def remove() -> None:
        module.config = base_config
        del vars(module)[ATTACHMENT]
        del module._modules[CHILD]

    return remove


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts with LoRA; what Transformers calls instead of its eager or grouped experts.

    Args:
        module: the experts module.
        hidden_states: [T, H].
        top_k_index: int64 [T, K]; values >= N are sentinels and contribute nothing.
        top_k_weights: routing weights, [T, K].

    Returns:
        [T, H], in the dtype of ``hidden_states``.
    """
    attachment: Attachment = vars(module)[ATTACHMENT]
    lora, observer = attachment.lora, attachment.observer
    if not observer.enabled:
        base = base_forward(module, attachment.base_config)
        return base(module, hidden_states, top_k_index, top_k_weights)
    observer.routed(lora.name, top_k_index, top_k_weights)
    first, second = projection_names(module)
    dtype = _compute_dtype(getattr(module, first))
    dispatch = Dispatch.sort(top_k_index, lora.table.num_experts)
    hidden = hidden_states.to(dtype)
    rows = _project(module, lora, first, hidden, dispatch, gather=True)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = rows.to(dtype)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(_project(module, lora, second, rows, dispatch))
        output = dispatch.combine(rows, top_k_weights)
    else:
        output = _project(module, lora, second, rows, dispatch, routing_weights=top_k_weights)
    return output.to(hidden_states.dtype)


def _project(
    module: Any, lora: ExpertLoRA, name: str, inputs: Tensor, dispatch: Dispatch, **options: Any
) -> Tensor:
    return expert_linear(
        inputs,
        getattr(module, name),
        getattr(module, f"{name}_bias") if module.has_bias else None,
        lora.factors(name),
        dispatch,
        transposed=module.is_transposed,
        **options,
    )


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the autocast dtype inside autocast, else that of the base weights."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def base_forward(module: Any, config: Any) -> Callable[..., Tensor]:
    """Return what the module would run without us: its own forward, or the user's choice."""
    own: Callable[..., Tensor] = type(module).forward.__wrapped__
    chosen: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS.get_interface(
        config._experts_implementation, own
    )
    return chosen


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
