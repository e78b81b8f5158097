"""Find the MoE layers of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn

from drlora_core.errors import UnknownLayerError, near_misses
from drlora_torch.errors import ModelError
from drlora_torch.models.convention import Convention
from drlora_torch.models.conventions import find_convention
from drlora_torch.models.records import MoELayer
from drlora_torch.models.refused import UNDECLARED, Refused, is_undeclared


def discover(model: nn.Module) -> list[MoELayer]:
    """List the MoE layers of a model; attaches nothing and changes nothing.

    Args:
        model: any ``nn.Module``, usually a Transformers model.

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
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: list[MoELayer] = []
    for name, module in model.named_modules():
        if any(not layer.name or name.startswith(f"{layer.name}.") for layer in found):
            continue  # a part of a layer is no layer of its own
        if (convention := find_convention(module)) is not None:
            found.append(_record(model, name, module, convention))
        elif is_undeclared(name, module):
            found.append(_undeclared(model, name, module))
    return found


def choose_layers(
    model: nn.Module, found: Sequence[MoELayer], patterns: Sequence[str] | None = None
) -> list[MoELayer]:
    """Choose the layers to adapt: those whose name matches one of the patterns (``fnmatch``).

    Without patterns all but those that are adapted on request only.

    Args:
        model: the model, for messages.
        found: its layers, from :func:`discover`.
        patterns: name patterns.

    Raises:
        ModelError: there is no MoE layer, or a chosen one has an obstacle.
        UnknownLayerError: a pattern matches nothing; the message lists near misses.
    """
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no mixture-of-experts layer that drlora can adapt; "
            "drlora_torch.discover(model) lists what it finds"
        )
    names = [layer.name for layer in found]
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise UnknownLayerError(
                f"no MoE layer matches {pattern!r}; {near_misses(pattern, names)}"
            )
    chosen = [
        layer
        for layer in found
        if (patterns is None and not layer.only_on_request)
        or any(fnmatch.fnmatchcase(layer.name, p) for p in patterns or ())
    ]
    for layer in chosen:
        if layer.obstacle is not None:
            raise ModelError(f"layer {layer.name!r} cannot be adapted: {layer.obstacle}")
    return chosen


def _record(model: nn.Module, name: str, module: Any, convention: Convention) -> MoELayer:
    obstacle = convention.obstacle(module)
    weight = convention.first_weight(module)
    return MoELayer(
        name=name,
        experts_class=type(module).__name__,
        num_experts=convention.num_experts(module),
        projections={} if obstacle else convention.projection_shapes(module),
        router=_router_name(model, name, convention.router_child(module)),
        dtype="unknown" if weight is None else str(weight.dtype).removeprefix("torch."),
        obstacle=obstacle,
        convention=convention.name,
        only_on_request=convention.only_on_request(module),
    )


def _undeclared(model: nn.Module, name: str, module: Any) -> MoELayer:
    block = type(model.get_submodule(name.rpartition(".")[0]))
    weight = next(iter(module.parameters()), None)
    return MoELayer(
        name=name,
        experts_class=type(module).__name__,
        num_experts=len(module),
        projections={},
        router=None,
        dtype="unknown" if weight is None else str(weight.dtype).removeprefix("torch."),
        obstacle=UNDECLARED.format(block=f"{block.__module__}.{block.__qualname__}"),
        convention=Refused.name,
    )


def _router_name(model: nn.Module, layer: str, child: str | None) -> str | None:
    """The router in the layer, or the one beside it.

    It is of the class that the model declares to record logits of, else of the only class there
    that is called a router.
    """
    if child is not None:
        return f"{layer}.{child}" if layer else child
    parent, _, _ = layer.rpartition(".")
    classes = _declared_router_classes(model)
    beside = list(model.get_submodule(parent).named_children())
    declared = [name for name, module in beside if type(module) in classes]
    called = [name for name, module in beside if type(module).__name__.endswith("Router")]
    if not declared and len(called) != 1:
        return None
    name = (declared or called)[0]
    return f"{parent}.{name}" if parent else name


def _declared_router_classes(model: nn.Module) -> set[type]:
    """Classes under ``router_logits`` in the ``_can_record_outputs`` of the model's parts."""
    classes: set[type] = set()
    for module in model.modules():
        recorded = getattr(type(module), "_can_record_outputs", None) or {}
        entries = recorded.get("router_logits", ())
        for entry in entries if isinstance(entries, (list, tuple)) else (entries,):
            target: Any = getattr(entry, "target_class", entry)
            classes.add(target)
    return classes
