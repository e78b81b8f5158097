"""What a step has gathered when an adapter is saved, or rests, between two of its micro-batches.

Tensors of a file, there only while a step is unfinished: ``pending/routing/{layer}`` float64
[N + 1], see :meth:`RoutingCounter.totals`; ``pending/gradient/{tensor}``, of the shape of the
parameter that the file holds as ``{tensor}``; with ``auto_step=False`` also
``pending/importance/{tensor}`` [P].

Shape letters: N experts, P rank slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drlora_torch.distributed import several_processes
from drlora_torch.errors import CheckpointError

if TYPE_CHECKING:
    from drlora_torch.adapter import Adapter

ROUTING, GRADIENT, IMPORTANCE = "pending/routing/", "pending/gradient/", "pending/importance/"

Wanted = Mapping[str, tuple[tuple[int, ...], bool]]
"""Shapes of tensors in a file by name, and whether they hold floating-point numbers."""


def gathered(adapter: Adapter) -> dict[str, Tensor]:
    """What there is of an unfinished step; nothing between optimizer steps."""
    if not adapter.is_active:
        return adapter.unfinished
    if adapter.accumulated is None and adapter.gradients_dropped():
        return {}  # the step was given up, as the next forward will notice
    totals = {f"{ROUTING}{name}": counter.totals() for name, counter in adapter.counters.items()}
    found: dict[str, Tensor] = {}
    if any(counted[-1] for counted in totals.values()):
        found |= {key: torch.from_numpy(counted) for key, counted in totals.items()}
    if adapter.gradients_seen:
        for key, parameter in _parameters(adapter).items():
            if parameter.grad is not None:
                found[f"{GRADIENT}{key}"] = parameter.grad
    if adapter.accumulated is not None:
        found |= {f"{IMPORTANCE}{key}": part for key, part in adapter.accumulated.parts.items()}
    return found


def of(adapter: Adapter) -> dict[str, Tensor]:
    """What to save with an adapter."""
    found = gathered(adapter)
    if found and several_processes():
        warnings.warn(
            "saved between micro-batches of an optimizer step: with several processes those are "
            "left out, since each process has gradients of its own; go on from the beginning of "
            "the step",
            RuntimeWarning,
            stacklevel=4,
        )
        return {}
    return found


def allowed(wanted: Wanted, layers: Mapping[str, Any], auto_step: bool) -> Wanted:
    """What :func:`of` may have written beside the tensors of a whole step."""
    found: dict[str, tuple[tuple[int, ...], bool]] = {
        f"{ROUTING}{name}": ((layers[name]["num_experts"] + 1,), True) for name in layers
    }
    for key, (shape, floating) in wanted.items():
        if floating:
            found[f"{GRADIENT}{key}"] = shape, True
            if not auto_step and not key.startswith("router/"):
                found[f"{IMPORTANCE}{key}"] = shape[:1], True
    return found


def check_counts(tensors: Mapping[str, Tensor]) -> None:
    """Refuse totals that no counting gives.

    Raises:
        CheckpointError: a negative sum, or a number of tokens that is not a whole number.
    """
    for key, totals in tensors.items():
        if key.startswith(ROUTING) and (bool((totals < 0).any()) or float(totals[-1]) % 1 != 0):
            raise CheckpointError(f"{key} holds counts that are impossible")


def fill(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Bring an adapter into the middle of the step that a file was saved in, or between steps.

    A resting one will be there when it is active again.
    """
    if not adapter.is_active:
        adapter.unfinished = {k: v for k, v in tensors.items() if k.startswith("pending/")}
        return
    adapter.forget()
    arrived: dict[str, Tensor] = {}
    for key, parameter in _parameters(adapter).items():
        gradient = tensors.get(f"{GRADIENT}{key}")
        parameter.grad = None if gradient is None else gradient.to(parameter)
        if (importance := tensors.get(f"{IMPORTANCE}{key}")) is not None:
            arrived[key] = importance.to(parameter.device)
    if adapter.accumulated is not None:
        adapter.accumulated.parts = arrived
    adapter.gradients_seen = any(key.startswith((GRADIENT, IMPORTANCE)) for key in tensors)
    for name, counter in adapter.counters.items():
        if (totals := tensors.get(f"{ROUTING}{name}")) is not None:
            counter.resume(totals.to(adapter.layers[name].lora.device))


def _parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """What has gradients, by the names that files have for it."""
    found = {
        key: parameter
        for layer in adapter.layers.values()
        for key, parameter in layer.lora.tensors().items()
    }
    return found | {f"router/{n}": p for n, p in adapter.router_parameters().items()}
