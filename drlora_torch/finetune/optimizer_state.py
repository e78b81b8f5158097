"""The state of an optimizer in a file that is the same for every sharding of the model.

It is what the Trainer writes in one process: whole tensors, and two groups of parameters. Where
the parameters are on different meshes, the Trainer makes more groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from drlora_torch.lora import parts

Groups = Sequence[Sequence[Tensor]]
"""The parameters of an optimizer, grouped as in one process."""


def gather(optimizer: Any, groups: Groups, *, keep: bool) -> dict[str, Any]:
    """Return the state dict of one process; all processes must call.

    Args:
        optimizer: one that holds the parameters of ``groups``, and no others.
        groups: its parameters.
        keep: whether this process needs the result.
    """
    options = _options_by_parameter(optimizer)
    found: dict[str, Any] = {"state": {}, "param_groups": []}
    for parameters in groups:
        first = len(found["state"])
        for number, parameter in enumerate(parameters, first):
            state = optimizer.state.get(parameter, {}).items()
            whole = {key: _whole(value) for key, value in state}
            found["state"][number] = whole if keep else {}
        own = options[id(parameters[0])] if parameters else optimizer.param_groups[0]
        numbers = list(range(first, len(found["state"])))
        found["param_groups"].append({**own, "params": numbers})
    return found


def scatter(optimizer: Any, groups: Groups, state: dict[str, Any]) -> None:
    """Load what :func:`gather` returned, or what one process wrote, into an optimizer."""
    saved = {id(p): number for number, p in enumerate(p for group in groups for p in group)}
    whose = {id(p): place for place, group in enumerate(groups) for p in group}
    own: dict[str, Any] = {"state": {}, "param_groups": []}
    count = 0
    for group in optimizer.param_groups:
        parameters = group["params"]
        for number, parameter in enumerate(parameters, count):
            values = state["state"].get(saved[id(parameter)], {}).items()
            own["state"][number] = {key: _spread(value, parameter) for key, value in values}
        options = state["param_groups"][whose[id(parameters[0])]] if parameters else group
        numbers = list(range(count, count + len(parameters)))
        own["param_groups"].append({**options, "params": numbers})
        count += len(parameters)
    optimizer.load_state_dict(own)


def _options_by_parameter(optimizer: Any) -> dict[int, dict[str, Any]]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _whole(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    spread: Any = value
    return (spread.full_tensor() if parts.is_sharded(value) else value).cpu()


def _spread(value: Any, parameter: Any) -> Any:
    """Cut a value of a parameter as the parameter is; what has another shape is not cut."""
    if not parts.is_sharded(parameter) or getattr(value, "shape", None) != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    held = value.to(mesh.device_type)
    return distribute_tensor(held, mesh, parameter.placements, src_data_rank=None)
