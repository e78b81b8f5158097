"""What an optimizer means by fresh state of a row, for rank slots that change owner.

Most state starts at zero. Some is a copy of the weights, some a setting, some is shared by all rows
and stays, and some is stored as codes. State whose meaning is not known is refused.

Shape letters: P rank slots, the rows of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch.errors import AttachError
from drlora_torch.lora.slots import IntArray
from drlora_torch.step.optimizers.codes import Reset, reset_blockwise, reset_subclass
from drlora_torch.step.optimizers.names import BITSANDBYTES, algorithm, class_names, is_a

Group = Mapping[str, Any]
Rule = Callable[[Group, nn.Parameter, Tensor], float | Tensor]
"""From a parameter, its group and an int64 index to the fresh state of the rows in the index."""


def _zeros(group: Group, parameter: nn.Parameter, index: Tensor) -> float:
    return 0.0


def _weights(group: Group, parameter: nn.Parameter, index: Tensor) -> Tensor:
    return parameter[index.to(parameter.device)]


def _shared(group: Group, parameter: nn.Parameter, index: Tensor) -> float:
    raise AssertionError("state that all rows share is left alone")


def _accumulator(group: Group, parameter: nn.Parameter, index: Tensor) -> float:
    return float(group["initial_accumulator_value"])


def _learning_rate(group: Group, parameter: nn.Parameter, index: Tensor) -> float:
    return float(group["lr"])


MEANINGS: Mapping[str, Rule] = {"zeros": _zeros, "weights": _weights, "shared": _shared}
COMMON: Mapping[str, Rule] = dict.fromkeys(
    (
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_avg_diff",
        "exp_inf",
        "momentum_buffer",
        "square_avg",
        "acc_delta",
        "grad_avg",
    ),
    _zeros,
)
"""Keys that mean the same under every optimizer, if the state has the parameter's shape."""
_SCHEDULE_FREE = dict.fromkeys("xyz", _weights)
OWN: dict[str, Mapping[str, Rule]] = {
    "torch.Adagrad": {"sum": _accumulator},
    "torch.Rprop": {"prev": _zeros, "step_size": _learning_rate},
    "torch.ASGD": {"ax": _weights},
    "torch.Adafactor": {"row_var": _zeros, "col_var": _shared},
    "transformers.Adafactor": {"exp_avg_sq_row": _zeros, "exp_avg_sq_col": _shared},
    **{
        f"schedulefree.{name}": _SCHEDULE_FREE
        for name in (
            "AdamWScheduleFree",
            "AdamWScheduleFreeClosure",
            "AdamWScheduleFreePaper",
            "AdamWScheduleFreeReference",
            "RAdamScheduleFree",
            "RAdamScheduleFreeClosure",
            "SGDScheduleFree",
            "SGDScheduleFreeClosure",
            "SGDScheduleFreeReference",
        )
    },
}
"""Keys with a meaning of their own, by optimizer and its subclasses."""
BITSANDBYTES_ALGORITHMS = {
    "adam", "lion", "momentum", "lars", "lamb", "rmsprop", "adagrad", "ademamix",
}  # fmt: skip
"""All of them start ``state1`` and ``state2`` at zero."""


def register_optimizer_state(
    optimizer: type[Optimizer], **keys: Literal["zeros", "weights", "shared"]
) -> None:
    """Tell drlora what the per-parameter state of an optimizer means, so that it can be reset.

    Args:
        optimizer: the class; subclasses inherit what is told of it.
        keys: for each key of ``optimizer.state[parameter]`` that holds a tensor, what a fresh row
            has: ``zeros``; ``weights``, the row's own values; or ``shared``: the state belongs to
            no row and stays.

    Example:
        >>> class Anchored(torch.optim.SGD): ...
        >>> register_optimizer_state(Anchored, start="weights", drift="zeros")
    """
    name = class_names(optimizer)[0]
    OWN[name] = {**OWN.get(name, {}), **{key: MEANINGS[told] for key, told in keys.items()}}


@torch.no_grad()
def clear_state(optimizer: Optimizer, parameter: nn.Parameter, slots: IntArray) -> None:
    """Make the state of rows of a parameter [P, ...] fresh; their values are the new ones."""
    index = torch.from_numpy(slots)
    for reset in _resets(optimizer, parameter):
        reset(index)


def check_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer with state that :func:`clear_state` cannot make fresh.

    Raises:
        AttachError: names the optimizer and the key.
    """
    for parameter in parameters:
        _resets(optimizer, parameter)


def _resets(optimizer: Optimizer, parameter: nn.Parameter) -> list[Reset]:
    state = optimizer.state.get(parameter, {})
    found = (_find_reset(optimizer, parameter, key) for key in state)
    return [reset for reset in found if reset is not None]


def _find_reset(optimizer: Optimizer, parameter: nn.Parameter, key: str) -> Reset | None:
    """How to reset one entry of a parameter's state; None if it belongs to no row."""
    value, rule = optimizer.state[parameter][key], _own_rule(optimizer, key)
    if rule is _shared or not isinstance(value, Tensor) or (rule is None and value.numel() == 1):
        if rule is None and _holds_tensors(value):
            raise _unknown(optimizer, parameter, key)
        return None
    if is_a(optimizer, BITSANDBYTES):
        if key.startswith(("qmap", "absmax")):
            return None
        reset = _bitsandbytes_reset(optimizer, parameter, key)
    elif class_names(type(value))[0].startswith("torchao."):
        reset = reset_subclass(value, parameter.shape[0])
    else:
        reset = _plain_reset(optimizer, parameter, key, rule)
    if reset is None:
        raise _unknown(optimizer, parameter, key)
    return reset


def _own_rule(optimizer: Optimizer, key: str) -> Rule | None:
    names = class_names(type(optimizer))
    told = [OWN[name][key] for name in names if key in OWN.get(name, {})]
    if not told and key in ("x", "y", "z") and names[0].startswith("torch."):
        return _weights  # the wrappers of schedulefree keep them in the optimizer that they wrap
    return told[0] if told else None


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
    stored = getattr(value, "_local_tensor", value)  # of a DTensor
    subclass = class_names(type(stored))[0].partition(".")[0] != "torch"
    if rule is None or subclass or value.shape[0] != parameter.shape[0]:
        return None
    groups = optimizer.param_groups
    group = next(g for g in groups if any(held is parameter for held in g["params"]))

    def reset(index: Tensor) -> None:
        fresh = rule(group, parameter, index)
        value[index.to(value.device)] = fresh.to(value) if isinstance(fresh, Tensor) else fresh

    return reset


def _holds_tensors(value: object) -> bool:
    """True for a container of tensors, of which nobody knows the rows."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value)


def _unknown(optimizer: Optimizer, parameter: nn.Parameter, key: str) -> AttachError:
    value, name = optimizer.state[parameter][key], type(optimizer).__name__
    shape = f" {list(value.shape)}" if isinstance(value, Tensor) else ""
    block = int(getattr(value, "block_size", 1))
    advice = (
        f"drlora_torch.register_optimizer_state({name}, {key}=...) tells what it means; or use an "
        "optimizer that drlora knows (docs/ecosystem.md, Optimizers)"
    )
    if parameter.shape[-1] % block:
        advice = (
            f"the optimizer's block_size {block} must divide the row length {parameter.shape[-1]}, "
            "so that no block spans two rows"
        )
    return AttachError(
        f"rank slots will change owner, and the state {key!r} ({type(value).__name__}{shape}) that "
        f"{name} keeps of a parameter {list(parameter.shape)} cannot be made fresh row by row; "
        f"{advice}; or keep the ranks fixed (r_init = r_target)"
    )
