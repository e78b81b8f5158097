"""What the per-parameter state of optimizers means: what a fresh row of it is.

Most state starts at zero. Some is a copy of the weights, some a setting, some is shared by all rows
and stays.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from drlora_torch.errors import AttachError
from drlora_torch.step.optimizers.names import class_names, full_name

Group = Mapping[str, Any]
Rule = Callable[[Group, Tensor, Tensor], float | Tensor]
"""From a parameter, its group and an int64 index to the fresh state of the rows in the index."""


def zeros(group: Group, parameter: Tensor, index: Tensor) -> float:
    return 0.0


def weights(group: Group, parameter: Tensor, index: Tensor) -> Tensor:
    return parameter[index.to(parameter.device)]


def shared(group: Group, parameter: Tensor, index: Tensor) -> float:
    raise AssertionError("state that all rows share is left alone")


def _accumulator(group: Group, parameter: Tensor, index: Tensor) -> float:
    return float(group["initial_accumulator_value"])


def _learning_rate(group: Group, parameter: Tensor, index: Tensor) -> float:
    return float(group["lr"])


MEANINGS: Mapping[str, Rule] = {"zeros": zeros, "weights": weights, "shared": shared}
COMMON: Mapping[str, Rule] = dict.fromkeys(
    (
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_avg_diff",
        "exp_avg_slow",
        "exp_avg_var",
        "exp_inf",
        "kahan_comp",
        "momentum_buffer",
        "square_avg",
        "acc_delta",
        "grad_avg",
    ),
    zeros,
)
"""Keys that mean the same under every optimizer, if the state has the parameter's shape."""
_SCHEDULE_FREE = dict.fromkeys("xyz", weights)
_CAME = {
    "exp_avg_sq_row": zeros,
    "exp_avg_res_row": zeros,
    "exp_avg_sq_col": shared,
    "exp_avg_res_col": shared,
}
OWN: dict[str, Mapping[str, Rule]] = {
    "torch.Adagrad": {"sum": _accumulator},
    "torch.Rprop": {"prev": zeros, "step_size": _learning_rate},
    "torch.ASGD": {"ax": weights},
    "torch.Adafactor": {"row_var": zeros, "col_var": shared},
    "transformers.Adafactor": {"exp_avg_sq_row": zeros, "exp_avg_sq_col": shared},
    "came_pytorch.CAME": _CAME,
    "pytorch_optimizer.CAME": _CAME,
    "pytorch_optimizer.ScheduleFreeAdamW": {"z": weights},
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
REGISTERED: dict[str, Mapping[str, Rule]] = {}
"""What users have told, by the full name of the class."""


def register_optimizer_state(
    optimizer: type[Optimizer], **keys: Literal["zeros", "weights", "shared"]
) -> None:
    """Tell drlora what the per-parameter state of an optimizer means, so that it can be reset.

    Args:
        optimizer: the class; subclasses inherit what is told of it.
        keys: for each key of ``optimizer.state[parameter]`` (or of a parameter group) that holds
            tensors, what a fresh row has: ``zeros``; ``weights``, the row's own values; or
            ``shared``: the state belongs to no row and stays.

    Raises:
        AttachError: ``optimizer`` is no class of optimizers, there is no key, or a meaning is not
            one of the three.

    Example:
        >>> class Anchored(torch.optim.SGD): ...
        >>> register_optimizer_state(Anchored, start="weights", drift="zeros")
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise AttachError(
            f"register_optimizer_state takes the class of an optimizer, got {optimizer!r:.80}; "
            "wrong:\n    register_optimizer_state(optimizer, ...)\nright:\n"
            "    register_optimizer_state(type(optimizer), ...)"
        )
    if not keys:
        raise AttachError(
            "register_optimizer_state takes at least one key of the optimizer's state; an "
            "optimizer without state needs none of this"
        )
    for key, told in keys.items():
        if told not in MEANINGS:
            near = difflib.get_close_matches(str(told), MEANINGS, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise AttachError(
                f"{key}={told!r} is no meaning of optimizer state: one of "
                f"{', '.join(map(repr, MEANINGS))}{meant}"
            )
    name = full_name(optimizer)
    told_now = {key: MEANINGS[told] for key, told in keys.items()}
    REGISTERED[name] = {**REGISTERED.get(name, {}), **told_now}


def find_rule(optimizer: Optimizer, key: str) -> Rule | None:
    """The meaning of a key under an optimizer; None if it has none of its own."""
    names = class_names(type(optimizer))
    for base, name in zip(type(optimizer).__mro__, names, strict=True):
        for told in (REGISTERED.get(full_name(base), {}), OWN.get(name, {})):
            if key in told:
                return told[key]
    if key in ("x", "y", "z") and names[0].startswith("torch."):
        return weights  # the wrappers of schedulefree keep them in the optimizer that they wrap
    return None
