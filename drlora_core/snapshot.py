"""Engine state as plain arrays and JSON values, and the checks on its way back in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drlora_core import timetable
from drlora_core.config import AllocatorConfig
from drlora_core.errors import LayoutError, near_misses
from drlora_core.layer import LayerState

VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A state that has passed every check."""

    layers: Mapping[str, LayerState]
    carry: tuple[int, ...]
    step: int


def to_dict(
    config: AllocatorConfig, layers: Mapping[str, LayerState], carry: tuple[int, ...], step: int
) -> dict[str, Any]:
    """Return the state as a nested dict; arrays are copies."""
    return {
        "version": VERSION,
        "config": config.model_dump(mode="json"),
        "step": step,
        "carry": list(carry),
        "layers": {name: _layer_to_dict(state) for name, state in layers.items()},
    }


def _layer_to_dict(state: LayerState) -> dict[str, Any]:
    values: dict[str, Any] = {
        "ranks": state.ranks.copy(),
        "routing": state.routing.copy(),
        "routing_count": state.routing_count,
        "importance": state.importance.copy(),
        "importance_count": state.importance_count.copy(),
        "observed": state.observed,
    }
    if state.dimensions is not None:
        values["dimensions"] = state.dimensions.copy()
    return values


def from_dict(state: Mapping[str, Any], config: AllocatorConfig) -> Snapshot:
    """Check a state against a configuration and rebuild it.

    Raises:
        LayoutError: naming what differs.
    """
    if not isinstance(state, Mapping):
        raise LayoutError(f"an engine state is a dict, got {type(state).__name__}")
    missing = {"version", "config", "step", "carry", "layers"} - set(state)
    if missing:
        raise LayoutError(f"the engine state lacks {sorted(missing)}; it is not one of ours")
    if state["version"] != VERSION:
        raise LayoutError(
            f"the engine state has version {state['version']!r}; this drlora reads {VERSION}"
        )
    _check_config(state["config"], config)
    layers = {
        str(name): _layer_from_dict(str(name), values, config)
        for name, values in _mapping("layers", state["layers"]).items()
    }
    if not isinstance(state["carry"], (list, tuple)):
        raise LayoutError(f"carry of the state is a {type(state['carry']).__name__}, not a list")
    carry = tuple(_count("carry", value) for value in state["carry"])
    pools = min(len(layers), 1) if config.scope == "global" else len(layers)
    if len(carry) != pools:
        raise LayoutError(f"the engine state carries {len(carry)} quotas for {pools} pools")
    step = _count("step", state["step"])
    _check_budget(layers, config, step)
    _check_ceilings(layers, config)
    return Snapshot(layers, carry, step)


def check_layout(loaded: Mapping[str, LayerState], own: Mapping[str, LayerState]) -> None:
    """Refuse a state of other layers, another order or other numbers of experts.

    Raises:
        LayoutError: naming the first difference.
    """
    for name in loaded:
        if name not in own:
            raise LayoutError(f"the state has a layer {name!r}; {near_misses(name, own)}")
    for name, state in own.items():
        if name not in loaded:
            raise LayoutError(f"the state lacks layer {name!r}; it has {len(loaded)} layers")
        if loaded[name].num_experts != state.num_experts:
            raise LayoutError(
                f"layer {name!r} has {state.num_experts} experts, "
                f"the state {loaded[name].num_experts}"
            )
    if list(loaded) != list(own):
        raise LayoutError(f"the state's layers are in another order: {list(loaded)[:3]} ...")


def _check_config(saved: Any, config: AllocatorConfig) -> None:
    own = config.model_dump(mode="json")
    saved = dict(_mapping("config", saved))
    differing = [
        f"{field} {saved.get(field)!r} (here {own.get(field)!r})"
        for field in own.keys() | saved.keys()
        if saved.get(field) != own.get(field)
    ]
    if differing:
        raise LayoutError(
            f"the state was saved under another configuration: {', '.join(sorted(differing))}; "
            f"build the engine with the saved one, AllocatorConfig(**state['config'])"
        )


def _layer_from_dict(name: str, values: Any, config: AllocatorConfig) -> LayerState:
    values = _mapping(f"layers[{name!r}]", values)
    wanted = {"ranks", "routing", "routing_count", "importance", "importance_count", "observed"}
    if config.policy == "prune":
        wanted.add("dimensions")
    if set(values) != wanted:
        raise LayoutError(
            f"layer {name!r} of the state has fields {sorted(values)}, not {sorted(wanted)}"
        )
    size = _plain(name, "ranks", values["ranks"]).shape
    if len(size) != 1 or size[0] < 1:
        raise LayoutError(f"layer {name!r}: ranks have shape {size}, not (num_experts,)")
    ranks = _array(name, "ranks", values["ranks"], np.int64, size)
    least = 1 if config.policy == "prune" else config.starting_rank
    if ranks.min() < least or ranks.max() > config.r_max:
        raise LayoutError(
            f"layer {name!r}: ranks lie in {ranks.min()}..{ranks.max()}, "
            f"not {least}..{config.r_max}"
        )
    dimensions = None
    if config.policy == "prune":
        shape = (size[0], config.r_max)
        dimensions = _array(name, "dimensions", values["dimensions"], np.float64, shape)
    if not isinstance(values["observed"], (bool, np.bool_)):
        raise LayoutError(f"layer {name!r}: observed is {values['observed']!r}, not true or false")
    return LayerState(
        ranks=ranks,
        routing=_array(name, "routing", values["routing"], np.float64, size),
        routing_count=_count("routing_count", values["routing_count"]),
        importance=_array(name, "importance", values["importance"], np.float64, size),
        importance_count=_array(
            name, "importance_count", values["importance_count"], np.int64, size
        ),
        dimensions=dimensions,
        observed=bool(values["observed"]),
    )


def _check_budget(layers: Mapping[str, LayerState], config: AllocatorConfig, step: int) -> None:
    groups = [layers] if config.scope == "global" else [{n: s} for n, s in layers.items()]
    for group in groups:
        total = sum(int(state.ranks.sum()) for state in group.values())
        size = sum(state.num_experts for state in group.values())
        if config.policy == "prune" and total != (due := _pruned_total(config, size, step)):
            raise LayoutError(
                f"ranks of {', '.join(map(repr, list(group)[:2]))} sum to {total}, "
                f"but pruning leaves {due} after step {step}"
            )
        budget = size * max(config.r_target, config.starting_rank)
        if total > budget:
            raise LayoutError(
                f"ranks of {', '.join(map(repr, list(group)[:2]))} sum to {total}, "
                f"above the budget of {budget}"
            )


def _check_ceilings(layers: Mapping[str, LayerState], config: AllocatorConfig) -> None:
    """Scope ``global``: no layer may hold more than its storage does."""
    for name, state in layers.items():
        ceiling = state.num_experts * config.mean_rank_ceiling
        if state.ranks.sum() > ceiling:
            raise LayoutError(
                f"layer {name!r}: ranks sum to {state.ranks.sum()}, above its ceiling of {ceiling}"
            )


def _pruned_total(config: AllocatorConfig, size: int, step: int) -> int:
    """Total rank of ``size`` experts that the pruning schedule leaves after a step."""
    end = min(step, config.growth_end)
    past = len(timetable.growth_steps(config.warmup_steps, config.growth_interval, end))
    start, target = size * config.r_init, size * config.r_target
    return timetable.cubic_total(past, config.num_events, start, target) if past else start


def _mapping(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise LayoutError(f"{what} of the state is a {type(value).__name__}, not a dict")
    return value


def _count(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise LayoutError(f"{what} of the state is {value!r}; accepted: whole numbers >= 0")
    return int(value)


def _plain(name: str, field: str, value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise LayoutError(f"layer {name!r}: {field} is no array: {error}") from None


def _array(name: str, field: str, value: Any, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
    """Copy an array of the state; only dtype-exact, finite, non-negative values are a state."""
    array = _plain(name, field, value)
    if array.dtype != dtype or array.shape != shape:
        raise LayoutError(
            f"layer {name!r}: {field} is {array.dtype}{list(array.shape)}, "
            f"not {np.dtype(dtype)}{list(shape)}"
        )
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise LayoutError(f"layer {name!r}: {field} holds a negative or non-finite value")
    return array.copy()
