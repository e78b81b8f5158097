"""Which parameters an adapter trains, and when."""

from __future__ import annotations

from torch import nn

from drlora_torch.attached import Attached
from drlora_torch.options import RouterMode


def lora_parameters(attached: Attached) -> list[nn.Parameter]:
    """A and B of all layers."""
    return [p for layer in attached.layers.values() for p in layer.lora.parameters()]


def router_parameters(attached: Attached) -> dict[str, nn.Parameter]:
    """Router parameters that learn (now or after the warmup), by qualified name."""
    if attached.options.router is RouterMode.FROZEN:
        return {}
    return {
        f"{layer.record.router}.{name}": parameter
        for layer in attached.layers.values()
        if layer.router is not None
        for name, parameter in layer.router.named_parameters()
    }


def parameters_by_key(attached: Attached) -> dict[str, nn.Parameter]:
    """All of them by their names in files: ``{layer}/{projection}/lora_A``, ``router/{name}``."""
    lora: dict[str, nn.Parameter] = {}
    for layer in attached.layers.values():
        lora |= layer.lora.tensors()
    return lora | {f"router/{name}": p for name, p in router_parameters(attached).items()}


def unfreeze_lora(attached: Attached) -> None:
    """Let A and B learn, unless the adapter was loaded for inference."""
    for parameter in lora_parameters(attached):
        parameter.requires_grad_(attached.trainable)


def unfreeze_routers(attached: Attached) -> None:
    """Let the routers learn as the mode says (``after_warmup``: once the warmup is over)."""
    engine = attached.engine
    warm = engine.step_count >= engine.config.warmup_steps
    learn = attached.trainable and (warm or attached.options.router is RouterMode.TRAINABLE)
    for parameter in router_parameters(attached).values():
        parameter.requires_grad_(learn)


def freeze_all(attached: Attached) -> None:
    """Stop A, B and the routers from learning, and drop their gradients."""
    for parameter in parameters_by_key(attached).values():
        parameter.requires_grad_(False)
        parameter.grad = None
