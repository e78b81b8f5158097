"""What a step that is not closed yet has gathered, as tensors for a file.

Shape letters: N experts, P rank slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.step.parameters import parameters_by_key

ROUTING, GRADIENT, IMPORTANCE = "pending/routing/", "pending/gradient/", "pending/importance/"

Tensors = dict[str, Tensor]


def save(
    attached: Attached, sums: Mapping[str, Tensor], read: Mapping[str, Tensor], *, gradients: bool
) -> Tensors:
    """Name the parts of a step.

    ``pending/routing/{layer}`` float64 [N + 1]; ``pending/gradient/{key}``, of the shape of the
    parameter of that key, if gradients have arrived; ``pending/importance/{key}`` [P].
    """
    found: Tensors = {}
    if sums:
        for name, layer in attached.layers.items():
            none = torch.zeros(layer.record.num_experts + 1, dtype=torch.float64)
            found[f"{ROUTING}{name}"] = sums.get(name, none).cpu()
    if gradients:
        for key, parameter in parameters_by_key(attached).items():
            if parameter.grad is not None:
                found[f"{GRADIENT}{key}"] = parameter.grad
    return found | {f"{IMPORTANCE}{key}": values for key, values in read.items()}


def load(attached: Attached, state: Mapping[str, Tensor]) -> tuple[Tensors, Tensors, bool]:
    """Give the parameters their gradients, or none.

    Returns:
        Routing sums by layer, importance by key, and whether any gradients had arrived.
    """
    importance: Tensors = {}
    for key, parameter in parameters_by_key(attached).items():
        gradient = state.get(f"{GRADIENT}{key}")
        if gradient is not None:
            gradient = gradient.to(parameter.device, parameter.dtype, copy=True)
        parameter.grad = gradient
        if (read := state.get(f"{IMPORTANCE}{key}")) is not None:
            importance[key] = read.to(parameter.device)
    sums: Tensors = {}
    for name, layer in attached.layers.items():
        counted = state.get(f"{ROUTING}{name}")
        if counted is not None and counted[-1]:
            sums[name] = counted.to(layer.lora.device)
    return sums, importance, any(key.startswith((GRADIENT, IMPORTANCE)) for key in state)
