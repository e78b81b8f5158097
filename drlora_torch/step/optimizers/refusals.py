"""Optimizer state whose rows drlora cannot find: where it hides, and what the user is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch.errors import AttachError
from drlora_torch.step.optimizers import meanings
from drlora_torch.step.optimizers.names import class_names

_DEPTH = 4  # of containers and objects that are looked into
_ELSE = (
    "or use an optimizer that drlora knows (docs/ecosystem.md, Optimizers); or keep the ranks "
    "fixed (policy 'uniform')"
)


class Problem(NamedTuple):
    """An entry of a parameter's state that cannot be made fresh row by row."""

    key: str
    value: Any
    parameter: nn.Parameter
    told: bool
    """True if the key has a meaning, so that only its shape does not fit."""


def owns_tensors(value: object, depth: int = _DEPTH) -> bool:
    """True for a container or object with a tensor of more than one number in it."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    if depth == 0 or isinstance(value, (type, nn.Module, Optimizer)):
        return False
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)) or hasattr(value, "maxlen"):
        parts = list(value)  # type: ignore[call-overload]
    else:
        parts = [*getattr(value, "__dict__", {}).values()]
        parts += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
    return any(owns_tensors(part, depth - 1) for part in parts)


class Place(NamedTuple):
    """Where an optimizer keeps tensors outside ``optimizer.state``."""

    name: str
    words: str


def find_state_elsewhere(optimizer: Optimizer, held: set[int]) -> Place | None:
    """Find tensors of parameters outside ``optimizer.state``; None if there are none.

    Args:
        optimizer: its parameter groups and its attributes are searched.
        held: ids of the parameters in question.
    """
    for group in optimizer.param_groups:
        if not any(id(parameter) in held for parameter in group["params"]):
            continue
        settings = {key: value for key, value in group.items() if key != "params"}
        for key in _unshared(optimizer, settings):
            if isinstance(group[key], (Tensor, Mapping, list, tuple)) and owns_tensors(group[key]):
                return Place(key, f"{key!r} of its parameter groups")
    attributes = {name: value for name, value in vars(optimizer).items() if name != "state"}
    for name in _unshared(optimizer, attributes):
        items = attributes[name].items() if isinstance(attributes[name], Mapping) else ()
        if any(id(key) in held and owns_tensors(value) for key, value in items):
            return Place(name, f"its attribute {name!r}")
    return None


def _unshared(optimizer: Optimizer, names: Iterable[str]) -> list[str]:
    return [name for name in names if meanings.find_rule(optimizer, name) is not meanings.shared]


def unclear_state(optimizer: Optimizer, problems: list[Problem]) -> AttachError:
    name = class_names(type(optimizer))[0]
    shape = list(problems[0].parameter.shape)
    listed = ", ".join(f"{each.key!r} ({_describe(each.value)})" for each in problems)
    return AttachError(
        f"rank slots will change owner, and the state {listed} that {name} keeps of a parameter "
        f"{shape} cannot be made fresh row by row; {_advise(optimizer, problems)}; {_ELSE}"
    )


def _describe(value: object) -> str:
    shape = f" {list(value.shape)}" if isinstance(value, Tensor) else ""
    return f"{type(value).__name__}{shape}"


def _advise(optimizer: Optimizer, problems: list[Problem]) -> str:
    row = problems[0].parameter.shape[-1]
    for each in problems:
        if row % int(getattr(each.value, "block_size", 1)):
            return (
                f"the optimizer's block_size {each.value.block_size} must divide the row length "
                f"{row}, so that no block spans two rows"
            )
    if class_names(type(optimizer))[0] == "torch.LBFGS":
        return "LBFGS keeps one history of all parameters together, which has no rows"
    parts = []
    if told := ", ".join(repr(each.key) for each in problems if each.told):
        parts.append(
            f"the meaning of {told} is known but its shape does not fit: zeros need a tensor with "
            "one row for each of the parameter's, weights the parameter's shape, and anything else "
            "can only be shared"
        )
    if unknown := ", ".join(f"{each.key}=..." for each in problems if not each.told):
        parts.append(
            f"drlora_torch.register_optimizer_state({type(optimizer).__name__}, {unknown}) tells "
            "what it means (zeros, weights or shared)"
        )
    return "; ".join(parts)


def state_elsewhere(optimizer: Optimizer, place: Place) -> AttachError:
    cls = type(optimizer)
    return AttachError(
        f"rank slots will change owner, and {class_names(cls)[0]} keeps tensors in {place.words}, "
        "where drlora cannot make rows fresh; if they belong to no row, drlora_torch."
        f"register_optimizer_state({cls.__name__}, {place.name}='shared') says so; {_ELSE}"
    )
