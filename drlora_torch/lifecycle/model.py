"""Changes to a model that serve all its adapters; each function returns its undo."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from drlora_torch.models.wrappers import is_adapted_by_peft

LOADED_IN = ("is_loaded_in_4bit", "is_loaded_in_8bit")


def freeze(model: nn.Module) -> Callable[[], None]:
    """Let no parameter of the base model require gradients."""
    if is_adapted_by_peft(model):  # PEFT has frozen the base; what it trains goes on
        return lambda: None
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)

    def thaw() -> None:
        for parameter, required in before:
            parameter.requires_grad_(required)

    return thaw


def keep_out_of_checkpoints(model: nn.Module, ours: Iterable[nn.Module]) -> Callable[[], None]:
    """Leave modules out of ``model.save_pretrained``, which then writes the base model.

    Transformers keeps a set of names for that on every ``PreTrainedModel``.
    """
    attribute = "_keys_to_ignore_on_save"
    before: list[tuple[Any, Any]] = []
    inherited = object()
    chosen = {id(part) for module in ours for part in module.modules()}
    for module in model.modules():
        if hasattr(module, "save_pretrained") and hasattr(module, attribute):
            before.append((module, vars(module).get(attribute, inherited)))
            inside = [each for each in module.named_modules() if id(each[1]) in chosen]
            names = {f"{name}.{key}" for name, part in inside for key in _own_keys(part)}
            setattr(module, attribute, set(getattr(module, attribute) or ()) | names)

    def restore() -> None:
        for module, value in before:
            if value is inherited:
                delattr(module, attribute)
            else:
                setattr(module, attribute, value)

    return restore


def _own_keys(module: nn.Module) -> list[str]:
    """Keys of a module in a state dict, without those of its children."""
    extra = type(module).get_extra_state is not nn.Module.get_extra_state
    return [*module._parameters, *(["_extra_state"] if extra else [])]


def say_that_adapters_are_there(model: nn.Module) -> Callable[[], None]:
    """Let trainers train a quantized model, as Transformers' integration of PEFT does.

    TRL rounds whatever learns to bfloat16 where a model says that it was loaded in 4 or 8 bits.
    """
    bits = {name: True for name in LOADED_IN if vars(model).get(name)}
    attribute = "_hf_peft_config_loaded"
    flagged = getattr(model, "is_quantized", False) and not getattr(model, attribute, False)
    vars(model).update(dict.fromkeys(bits, False))
    if flagged:
        setattr(model, attribute, True)

    def undo() -> None:
        vars(model).update(bits)
        if flagged:
            vars(model).pop(attribute, None)

    return undo


def let_checkpointing_reach_lora(model: nn.Module) -> Callable[[], None]:
    """Reentrant checkpointing gives no gradient to layers whose inputs need none; make them."""

    def require_grad(module: nn.Module, args: object, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and _checkpoints_activations(model):
            output.requires_grad_(True)

    handles = [
        embeddings.register_forward_hook(require_grad) for embeddings in _input_embeddings(model)
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The token embeddings of a model and of its parts: an encoder and a decoder may differ."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        get_embeddings = getattr(module, "get_input_embeddings", None)
        try:
            embeddings = None if get_embeddings is None else get_embeddings()
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Embedding) or (module is model and embeddings is not None):
            found[id(embeddings)] = embeddings
    return list(found.values())


def _checkpoints_activations(model: nn.Module) -> bool:
    """Ask a Transformers model; older versions have only the second name."""
    for attribute in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), attribute):
            return bool(getattr(model, attribute))
    return False
