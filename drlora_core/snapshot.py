"""Engine state as plain arrays and JSON values, and the checks when it is loaded."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool, ValidationError

from drlora_core import timetable
from drlora_core.bounds import LARGEST_STEP, MOST_EVENTS
from drlora_core.config import AllocatorConfig, Count, WholeNumber
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError, describe_validation_error, near_misses
from drlora_core.pools import make_pools
from drlora_core.state import LARGEST, State, make_state

VERSION = 1
MOST_STEPS = 2**53
"""Largest step and count: programs that read JSON numbers as floats have it exactly."""
Carry = Annotated[WholeNumber, Field(ge=0, le=MOST_EVENTS * LARGEST_STEP)]


def _check_array(dtype: type, value: Any) -> NDArray[Any]:
    """Copy an array; only the exact dtype and values that an engine makes are a state."""
    array = np.asarray(value)
    if array.dtype != dtype:
        raise ValueError(f"is {array.dtype}{list(array.shape)}; accepted: {np.dtype(dtype)}")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError("holds a negative or non-finite value")
    if array.size and array.max() > (largest := LARGEST if dtype is np.float64 else MOST_STEPS):
        raise ValueError(f"holds {array.max()}; accepted: at most {largest:g}")
    return array.copy()


Floats = Annotated[FloatArray, PlainValidator(functools.partial(_check_array, np.float64))]
Integers = Annotated[IntArray, PlainValidator(functools.partial(_check_array, np.int64))]


class LayerValues(BaseModel):
    """The state of a layer, see :class:`drlora_core.state.State`."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    ranks: Integers
    routing: Floats
    routing_count: Annotated[WholeNumber, Field(ge=0, le=MOST_STEPS)]
    importance: Floats
    importance_count: Integers
    observed: StrictBool
    dimensions: Floats | None = None


class EngineValues(BaseModel):
    """The state of an engine."""

    config: dict[str, Any]
    step: Count
    carry: tuple[Carry, ...]
    layers: dict[str, LayerValues]


def save_state(
    config: AllocatorConfig, state: State, carry: tuple[int, ...], step: int
) -> dict[str, Any]:
    """Return the state as a nested dict; arrays are copies."""
    return {
        "version": VERSION,
        "config": config.model_dump(),
        "step": step,
        "carry": list(carry),
        "layers": {name: _save_layer(state, name) for name in state.places},
    }


def _save_layer(state: State, name: str) -> dict[str, Any]:
    layer, experts = state.places[name]
    saved = {
        "ranks": state.ranks[experts].copy(),
        "routing": state.routing[experts].copy(),
        "routing_count": int(state.routing_count[layer]),
        "importance": state.importance[experts].copy(),
        "importance_count": state.importance_count[experts].copy(),
        "observed": bool(state.observed[layer]),
    }
    if state.dimensions is not None:
        saved["dimensions"] = state.dimensions[experts].copy()
    return saved


def load_state(state: Any, config: AllocatorConfig) -> tuple[State, tuple[int, ...], int]:
    """Check a state against a configuration; return it, the carried units and the step."""
    if not isinstance(state, Mapping):
        raise LayoutError(f"an engine state is a dict, got {type(state).__name__}")
    if (version := state.get("version")) != VERSION:
        raise LayoutError(f"the state has version {version!r}; this drlora reads version {VERSION}")
    try:
        values = EngineValues.model_validate(dict(state))
    except ValidationError as error:
        raise LayoutError(f"not an engine state: {describe_validation_error(error)}") from None
    _check_config(values.config, config)
    layers = values.layers
    for name, layer in layers.items():
        _check_layer(name, layer, config)
    pools = make_pools(config, {name: layer.ranks.size for name, layer in layers.items()})
    if len(values.carry) != len(pools):
        raise LayoutError(f"the state carries {len(values.carry)} quotas for {len(pools)} pools")
    for pool in pools:
        total = sum(int(layers[name].ranks.sum()) for name in pool.names)
        _check_budget(pool.describe(), total, pool.num_experts, config, values.step)
    return _join_layers(layers, config), values.carry, values.step


def _join_layers(layers: Mapping[str, LayerValues], config: AllocatorConfig) -> State:
    """Join the values of the layers, one layer after the other."""
    state = make_state(config, {name: values.ranks for name, values in layers.items()})
    for name, values in layers.items():
        layer, experts = state.places[name]
        state.routing[experts] = values.routing
        state.routing_count[layer] = values.routing_count
        state.importance[experts] = values.importance
        state.importance_count[experts] = values.importance_count
        state.observed[layer] = values.observed
        if state.dimensions is not None and values.dimensions is not None:
            state.dimensions[experts] = values.dimensions
    return state


def check_layout(loaded: Mapping[str, int], own: Mapping[str, int]) -> None:
    """Check that a state has the engine's layers, by their sizes, in the same order."""
    for name in loaded:
        if name not in own:
            raise LayoutError(f"the state has a layer {name!r}; {near_misses(name, own)}")
    for name, size in own.items():
        if name not in loaded:
            raise LayoutError(f"the state lacks layer {name!r}; it has {len(loaded)} layers")
        if loaded[name] != size:
            raise LayoutError(f"{name!r} has {size} experts, the state has {loaded[name]}")
    if list(loaded) != list(own):
        raise LayoutError(f"the state's layers are in another order: {list(loaded)[:3]} ...")


def _check_config(saved: dict[str, Any], config: AllocatorConfig) -> None:
    own = config.model_dump()
    saved = AllocatorConfig().model_dump() | saved  # it may be older than some fields
    differing = [
        f"{field} {saved[field]!r} (here {own.get(field)!r})"
        for field in sorted(saved)
        if saved[field] != own.get(field)
    ]
    if differing:
        raise LayoutError(
            f"the state was saved under another configuration: {', '.join(differing)}; "
            f"build the engine with the saved one, AllocatorConfig(**state['config'])"
        )


def _check_layer(name: str, values: LayerValues, config: AllocatorConfig) -> None:
    ranks = values.ranks
    if ranks.ndim != 1 or not ranks.size:
        raise LayoutError(f"layer {name!r}: ranks have shape {ranks.shape}, not (num_experts,)")
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(
        ("routing", "importance", "importance_count"), ranks.shape
    )
    shapes["dimensions"] = (ranks.size, config.r_max) if config.cuts else None
    for field, shape in shapes.items():
        found = getattr(getattr(values, field), "shape", None)
        if found != shape:
            raise LayoutError(f"layer {name!r}: {field} has shape {found}, not {shape}")
    least = config.least_rank
    if ranks.min() < least or ranks.max() > config.r_max:
        found = f"{ranks.min()}..{ranks.max()}"
        raise LayoutError(f"layer {name!r}: ranks lie in {found}, not {least}..{config.r_max}")
    total, ceiling = int(ranks.sum()), ranks.size * config.mean_rank_ceiling
    if config.scope == "global" and total > ceiling:
        raise LayoutError(f"layer {name!r}: ranks sum to {total}, above its ceiling of {ceiling}")


def _check_budget(where: str, total: int, size: int, config: AllocatorConfig, step: int) -> None:
    if config.policy == "prune":
        end = min(step, config.growth_end)
        past = len(timetable.growth_steps(config.warmup_steps, config.growth_interval, end))
        # A layer of which no sample has been seen is not pruned yet.
        if total not in (due := config.scheduled_total(size, past), size * config.r_init):
            raise LayoutError(
                f"ranks of {where} sum to {total}, but pruning leaves {due} after step {step}"
            )
    elif total > (budget := size * config.r_target):
        raise LayoutError(f"ranks of {where} sum to {total}, above the budget of {budget}")
