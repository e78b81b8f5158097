"""Which parameters an adapter trains, and when."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError
from drlora_torch.options import RouterMode


def lora_parameters(attached: Attached) -> list[nn.Parameter]:
    """A and B of the experts of all layers."""
    return [p for layer in attached.layers.values() for p in layer.lora.matrices()]


def dense_parameters(attached: Attached) -> dict[str, nn.Parameter]:
    """A and B of the Linears beside the experts, by their keys in files."""
    found: dict[str, nn.Parameter] = {}
    for each in attached.dense.values():
        found |= each.lora.tensors()
    return found


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


def base_parameters(attached: Attached) -> dict[str, nn.Parameter]:
    """Parameters of the base that learn: routers and ``modules_to_save``, by qualified name."""
    return join_base(router_parameters(attached), attached.modules)


def join_base(
    routers: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module]
) -> dict[str, nn.Parameter]:
    """Join the parameters of routers and of whole modules; a shared one has its first name."""
    named = dict(routers)
    for module, each in modules.items():
        named |= {f"{module}.{name}": parameter for name, parameter in each.named_parameters()}
    first: dict[int, str] = {}
    for name, parameter in named.items():
        first.setdefault(id(parameter), name)
    return {name: named[name] for name in first.values()}


def all_names(attached: Attached) -> dict[str, list[str]]:
    """Names of :func:`base_parameters` to all names in the model: tied ones have several."""
    return names_in(attached.model, base_parameters(attached))


def names_in(model: nn.Module, wanted: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """Keys of parameters to all of their names in a model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: names.get(id(parameter), []) for key, parameter in wanted.items()}


def check_in_place(attached: Attached) -> None:
    """Refuse to go on with trained modules or adapted Linears that the model no longer has.

    Raises:
        AttachError: one was replaced or resized.
    """
    named = dict(attached.model.named_modules()) if attached.modules or attached.dense else {}
    inside = {id(module) for module in named.values()}  # PEFT may have given a Linear another name
    replaced = [name for name, module in attached.modules.items() if named.get(name) is not module]
    replaced += [name for name, each in attached.dense.items() if id(each.linear) not in inside]
    for name, parameter in base_parameters(attached).items():
        hidden = attached.hidden_values.get(name)
        if hidden is not None and hidden.shape != parameter.shape:
            replaced.append(name)
    if replaced:
        raise AttachError(
            f"{replaced[0]!r} was replaced or resized since attach (by resize_token_embeddings, or "
            "modules_to_save of PEFT?), so the adapter would train what the model does not use; do "
            "that before attach"
        )


def base_key(name: str, routers: Mapping[str, nn.Parameter]) -> str:
    """Name of a parameter of the base in files."""
    return f"{'router' if name in routers else 'module'}/{name}"


def base_keys(attached: Attached) -> dict[str, str]:
    """Names of :func:`base_parameters` to their names in files."""
    routers = router_parameters(attached)
    return {name: base_key(name, routers) for name in base_parameters(attached)}


def parameters_by_key(attached: Attached) -> dict[str, nn.Parameter]:
    """All parameters that learn by their keys in files.

    ``{layer}/{projection}/lora_A``, ``dense/{name}/lora_A``, ``router/{name}``, ``module/{name}``.
    """
    lora: dict[str, nn.Parameter] = {}
    for layer in attached.layers.values():
        lora |= layer.lora.tensors()
    lora |= dense_parameters(attached)
    keys = base_keys(attached)
    return lora | {keys[name]: p for name, p in base_parameters(attached).items()}


def unfreeze_lora(attached: Attached) -> None:
    """Let A and B learn, unless the adapter was loaded for inference."""
    for parameter in (*lora_parameters(attached), *dense_parameters(attached).values()):
        parameter.requires_grad_(attached.trainable)


def unfreeze_base(attached: Attached) -> None:
    """Let routers and ``modules_to_save`` learn; see :mod:`drlora_torch.step.warmup` for when."""
    for parameter in base_parameters(attached).values():
        parameter.requires_grad_(attached.trainable)


def freeze_all(attached: Attached) -> None:
    """Stop all of them from learning, and drop their gradients."""
    for parameter in parameters_by_key(attached).values():
        parameter.requires_grad_(False)
        parameter.grad = None
