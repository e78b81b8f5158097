"""Make the optimizer state of rank slots fresh when they change owner, or refuse the optimizer.

State may be plain tensors, or codes with shared scales. State whose meaning is not known is
refused, and so is state that is kept where no row of it can be found.

Shape letters: P rank slots, the rows of a parameter, F features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch.lora import parts
from drlora_torch.lora.parts import HeldRows
from drlora_torch.step.optimizers import meanings, refusals
from drlora_torch.step.optimizers.codes import Reset, reset_blockwise, reset_subclass
from drlora_torch.step.optimizers.meanings import COMMON, Rule, find_rule
from drlora_torch.step.optimizers.names import (
    BITSANDBYTES,
    algorithm,
    class_names,
    is_a,
)
from drlora_torch.step.optimizers.refusals import Problem

BITSANDBYTES_ALGORITHMS = {
    "adam", "lion", "momentum", "lars", "lamb", "rmsprop", "adagrad", "ademamix",
}  # fmt: skip
"""All of them start ``state1`` and ``state2`` at zero."""


@torch.no_grad()
def clear_state(optimizer: Optimizer, parameter: nn.Parameter, slots: HeldRows) -> None:
    """Make the state of rows of a parameter [P, ...] fresh; their values are the new ones.

    Raises:
        AttachError: as :func:`check_state` does.
    """
    index = slots.of(parameter)[1]
    resets, problems = _find_resets(optimizer, parameter)
    if problems:
        raise refusals.unclear_state(optimizer, problems)
    for reset in resets:
        reset(index)


def check_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer with state that :func:`clear_state` cannot make fresh.

    Call it after a step: a parameter with a gradient has its state then.

    Raises:
        AttachError: names the optimizer and its keys.
    """
    own = list(parameters)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Problem] = {}
    alike = {_form_of(optimizer, parameter): parameter for parameter in reversed(own)}
    for parameter in reversed(alike.values()):
        for problem in _find_resets(optimizer, parameter)[1]:
            found.setdefault(problem.key, problem)
    if found:
        raise refusals.unclear_state(optimizer, list(found.values()))
    if (place := refusals.find_state_elsewhere(optimizer, {id(p) for p in own} & held)) is not None:
        raise refusals.state_elsewhere(optimizer, place)


def _form_of(optimizer: Optimizer, parameter: nn.Parameter) -> tuple[Any, ...]:
    """All that a problem with the state of a parameter can depend on: most have the same."""
    form: list[Any] = [parameter.shape, parameter.dtype, parts.is_sharded(parameter)]
    for key, value in optimizer.state.get(parameter, {}).items():
        rows = isinstance(value, Tensor) and (value.dim() or key == "step")
        form.append((key, type(value), value.shape, value.dtype) if rows else (key, id(value)))
    return tuple(form)


def _find_resets(
    optimizer: Optimizer, parameter: nn.Parameter
) -> tuple[list[Reset], list[Problem]]:
    state = optimizer.state.get(parameter, {})
    found = [_find_reset(optimizer, parameter, key) for key in state]
    problems = [each for each in found if isinstance(each, Problem)]
    return [each for each in found if each and not isinstance(each, Problem)], problems


def _find_reset(optimizer: Optimizer, parameter: nn.Parameter, key: str) -> Reset | Problem | None:
    """How to reset one entry of a parameter's state; None if it belongs to no row."""
    value, rule = optimizer.state[parameter][key], find_rule(optimizer, key)
    if rule is meanings.shared:
        return None
    problem = Problem(key, value, parameter, told=rule is not None)
    if not isinstance(value, Tensor):
        return problem if refusals.owns_tensors(value) else None
    if rule is None and value.numel() == 1:
        return None
    if rule is meanings.weights and value.dim() == 0 and not value.any():
        return None  # weights that were all zero at the start: those of B, whose new rows are zero
    if is_a(optimizer, BITSANDBYTES):
        if key.startswith(("qmap", "absmax")):
            return None
        reset = _bitsandbytes_reset(optimizer, parameter, key)
    elif class_names(type(value))[0].startswith("torchao."):
        reset = reset_subclass(value, parameter.shape[0])
    else:
        reset = _plain_reset(optimizer, parameter, key, rule)
    return problem if reset is None else reset


def _bitsandbytes_reset(optimizer: Optimizer, parameter: nn.Parameter, key: str) -> Reset | None:
    state = optimizer.state[parameter]
    value = state[key]
    known = key in ("state1", "state2") and algorithm(optimizer) in BITSANDBYTES_ALGORITHMS
    if not known or value.shape[-parameter.dim() :] != parameter.shape:
        return None
    if value.dtype == torch.uint8:
        return reset_blockwise(state, key)
    rows = value.dim() - parameter.dim()  # AdEMAMix stacks two averages in front
    return lambda index: value.index_fill_(rows, index.to(value.device), 0.0)


def _plain_reset(
    optimizer: Optimizer, parameter: nn.Parameter, key: str, rule: Rule | None
) -> Reset | None:
    value = optimizer.state[parameter][key]
    if rule is None and value.shape == parameter.shape:
        rule = COMMON.get(key)
    if parts.is_sharded(parameter) and not parts.is_sharded(value):
        return None
    value, weights = parts.local(value), parts.local(parameter)
    subclass = class_names(type(value))[0].partition(".")[0] != "torch"
    if rule is None or subclass or (rows := _as_rows(value, weights)) is None:
        return None
    if rule is meanings.weights and rows.shape != weights.shape:
        return None

    def reset(index: Tensor) -> None:
        fresh = rule(_group_of(optimizer, parameter), weights, index)
        place = index.to(rows.device)
        if isinstance(fresh, Tensor):
            rows.index_copy_(0, place, fresh.to(rows))
        else:
            rows.index_fill_(0, place, fresh)

    return reset


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    groups = optimizer.param_groups
    return next(g for g in groups if any(held is parameter for held in g["params"]))


def _as_rows(value: Tensor, parameter: Tensor) -> Tensor | None:
    """A state [P, ...] itself, or a flat one [P * n] as [P, n]; None if it has no such rows."""
    if value.dim() and value.shape[0] == parameter.shape[0]:
        return value
    if value.dim() == 1 and value.numel() and len(parameter) and not value.numel() % len(parameter):
        return value.view(parameter.shape[0], -1)
    return None
