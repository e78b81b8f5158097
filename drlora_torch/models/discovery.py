"""Find the MoE layers of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn

from drlora_core.errors import UnknownLayerError, near_misses
from drlora_torch.errors import ModelError
from drlora_torch.models.convention import Convention, dtype_name
from drlora_torch.models.conventions import find_convention
from drlora_torch.models.records import MoELayer
from drlora_torch.models.refused import CONTAINERS, refusal
from drlora_torch.models.wrappers import unwrapped


def discover(model: nn.Module) -> list[MoELayer]:
    """List the MoE layers of a model; attaches nothing and changes nothing.

    Args:
        model: any ``nn.Module``, usually a Transformers model. Wrappers around it (PEFT,
            ``torch.compile``, data parallelism) are looked through.

    Returns:
        One record per experts module, in the order of the model; ``obstacle`` says why a layer
        cannot be adapted.

    Example:
        >>> from transformers import OlmoeConfig, OlmoeForCausalLM
        >>> config = OlmoeConfig(hidden_size=8, intermediate_size=4, num_hidden_layers=1,
        ...     num_attention_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=16)
        >>> [(layer.name, layer.num_experts) for layer in discover(OlmoeForCausalLM(config))]
        [('model.layers.0.mlp.experts', 4)]
    """
    return find_layers(model)


def find_layers(model: nn.Module, *, on_meta: bool = False) -> list[MoELayer]:
    """List the MoE layers as :func:`discover` does; ``on_meta`` takes the meta device as loaded."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    routers = _declared_router_classes(model)
    found: list[MoELayer] = []
    for name, module in model.named_modules():
        if any(not layer.name or name.startswith(f"{layer.name}.") for layer in found):
            continue  # a part of a layer is no layer of its own
        if (convention := find_convention(module)) is not None:
            obstacle = convention.obstacle(module, on_meta=on_meta)
            found.append(_adaptable(model, name, module, convention, obstacle, routers))
        elif (reason := refusal(model, name, module)) is not None:
            found.append(_refused(model, name, module, reason, routers))
    return found


def choose_layers(
    model: nn.Module, found: Sequence[MoELayer], patterns: Sequence[str] | None = None
) -> list[MoELayer]:
    """Choose the layers to adapt: those whose name matches one of the patterns (``fnmatch``).

    Without patterns all of ``found`` but those that are adapted on request only.

    Raises:
        ModelError: there is no MoE layer, or a chosen one has an obstacle.
        UnknownLayerError: a pattern matches nothing; the message lists near misses.
    """
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no mixture-of-experts layer that drlora can adapt; "
            "drlora_torch.discover(model) lists what it finds"
        )
    if patterns is None:
        chosen = [layer for layer in found if not layer.only_on_request]
    else:
        names = [layer.name for layer in found]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise UnknownLayerError(
                    f"no MoE layer matches {pattern!r}; {near_misses(pattern, names)}"
                )
        chosen = [
            layer for layer in found if any(fnmatch.fnmatchcase(layer.name, p) for p in patterns)
        ]
    for layer in chosen:
        if layer.obstacle is not None:
            raise ModelError(f"layer {layer.name!r} cannot be adapted: {layer.obstacle}")
    return chosen


def _adaptable(
    model: nn.Module,
    name: str,
    module: Any,
    convention: Convention,
    obstacle: str | None,
    routers: set[type],
) -> MoELayer:
    inside = convention.router
    storage, nbytes = convention.storage(module)
    return MoELayer(
        name=name,
        experts_class=type(module).__name__,
        num_experts=convention.num_experts(module),
        projections={} if obstacle else convention.projection_shapes(module),
        router=_joined(name, inside) if inside else _router_beside(model, name, routers),
        dtype=storage,
        obstacle=obstacle,
        convention=convention.name,
        only_on_request=convention.only_on_request,
        nbytes=nbytes,
    )


def _refused(model: nn.Module, name: str, module: Any, reason: str, routers: set[type]) -> MoELayer:
    container = isinstance(module, CONTAINERS)
    return MoELayer(
        name=name,
        experts_class=type(module).__name__,
        num_experts=len(module) if container else module.num_experts,
        projections={},
        router=None if container else _router_beside(model, name, routers),
        dtype=dtype_name(next(module.parameters(), None)),
        obstacle=reason,
        convention="none",
        nbytes=sum(parameter.nbytes for parameter in module.parameters()),
    )


def _router_beside(model: nn.Module, layer: str, routers: set[type]) -> str | None:
    """A module beside the layer of a declared class, else the only one there called a router."""
    parent = layer.rpartition(".")[0]
    beside = {name: type(child) for name, child in model.get_submodule(parent).named_children()}
    declared = [name for name, kind in beside.items() if kind in routers]
    called = [name for name, kind in beside.items() if kind.__name__.endswith("Router")]
    if declared or len(called) == 1:
        return _joined(parent, (declared or called)[0])
    return None


def _joined(module: str, child: str) -> str:
    return f"{module}.{child}" if module else child


def _declared_router_classes(model: nn.Module) -> set[type]:
    """Classes under ``router_logits`` in the ``_can_record_outputs`` of the model's parts."""
    classes: set[Any] = set()
    for module in model.modules():
        recorded = getattr(type(module), "_can_record_outputs", None) or {}
        entries = recorded.get("router_logits", ())
        for entry in entries if isinstance(entries, (list, tuple)) else (entries,):
            classes.add(getattr(entry, "target_class", entry))
    return classes
