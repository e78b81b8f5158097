"""Engine state as plain arrays and JSON values, and the checks when it is loaded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PlainValidator, StrictBool, ValidationError

from drlora_core import timetable
from drlora_core.config import AllocatorConfig, Count
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError, describe_validation_error, near_misses
from drlora_core.layer import LayerState
from drlora_core.pools import make_pools

VERSION = 1
Layers = Mapping[str, LayerState]


def _check_array(dtype: type, value: Any) -> NDArray[Any]:
    """Copy an array; only the exact dtype and finite, non-negative values are a state."""
    array = np.asarray(value)
    if array.dtype != dtype:
        raise ValueError(f"is {array.dtype}{list(array.shape)}; accepted: {np.dtype(dtype)}")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError("holds a negative or non-finite value")
    return array.copy()


Floats = Annotated[FloatArray, PlainValidator(functools.partial(_check_array, np.float64))]
Integers = Annotated[IntArray, PlainValidator(functools.partial(_check_array, np.int64))]


class LayerValues(BaseModel):
    """The state of a layer, see :class:`drlora_core.layer.LayerState`."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    ranks: Integers
    routing: Floats
    routing_count: Count
    importance: Floats
    importance_count: Integers
    observed: StrictBool
    dimensions: Floats | None = None


class EngineValues(BaseModel):
    """The state of an engine."""

    config: dict[str, Any]
    step: Count
    carry: tuple[Count, ...]
    layers: dict[str, LayerValues]


def save_state(
    config: AllocatorConfig, layers: Layers, carry: tuple[int, ...], step: int
) -> dict[str, Any]:
    """Return the state as a nested dict; arrays are copies."""
    saved: dict[str, dict[str, Any]] = {}
    for name, state in layers.items():
        values = {field: copy.copy(getattr(state, field)) for field in LayerValues.model_fields}
        saved[name] = {field: value for field, value in values.items() if value is not None}
    return {
        "version": VERSION,
        "config": config.model_dump(mode="json"),
        "step": step,
        "carry": list(carry),
        "layers": saved,
    }


def load_state(
    state: Any, config: AllocatorConfig
) -> tuple[dict[str, LayerState], tuple[int, ...], int]:
    """Check a state against a configuration; return the layers, the carried units and the step."""
    if not isinstance(state, Mapping):
        raise LayoutError(f"an engine state is a dict, got {type(state).__name__}")
    if (version := state.get("version")) != VERSION:
        raise LayoutError(f"the state has version {version!r}; this drlora reads version {VERSION}")
    try:
        values = EngineValues.model_validate(dict(state))
    except ValidationError as error:
        raise LayoutError(f"not an engine state: {describe_validation_error(error)}") from None
    _check_config(values.config, config)
    layers = {name: _load_layer(name, layer, config) for name, layer in values.layers.items()}
    pools = make_pools(config, {name: state.num_experts for name, state in layers.items()})
    if len(values.carry) != len(pools):
        raise LayoutError(f"the state carries {len(values.carry)} quotas for {len(pools)} pools")
    for pool in pools:
        total = sum(int(layers[name].ranks.sum()) for name in pool.names)
        _check_budget(pool.describe(), total, pool.num_experts, config, values.step)
    return layers, values.carry, values.step


def check_layout(loaded: Layers, own: Layers) -> None:
    """Check that a state has the engine's layers, in the same order, of the same sizes."""
    for name in loaded:
        if name not in own:
            raise LayoutError(f"the state has a layer {name!r}; {near_misses(name, own)}")
    for name, state in own.items():
        if name not in loaded:
            raise LayoutError(f"the state lacks layer {name!r}; it has {len(loaded)} layers")
        if (size := loaded[name].num_experts) != state.num_experts:
            raise LayoutError(f"{name!r} has {state.num_experts} experts, the state has {size}")
    if list(loaded) != list(own):
        raise LayoutError(f"the state's layers are in another order: {list(loaded)[:3]} ...")


def _check_config(saved: dict[str, Any], config: AllocatorConfig) -> None:
    own = config.model_dump(mode="json")
    differing = [
        f"{field} {saved.get(field)!r} (here {own.get(field)!r})"
        for field in sorted(own.keys() | saved.keys())
        if saved.get(field) != own.get(field)
    ]
    if differing:
        raise LayoutError(
            f"the state was saved under another configuration: {', '.join(differing)}; "
            f"build the engine with the saved one, AllocatorConfig(**state['config'])"
        )


def _load_layer(name: str, values: LayerValues, config: AllocatorConfig) -> LayerState:
    ranks = values.ranks
    if ranks.ndim != 1 or not ranks.size:
        raise LayoutError(f"layer {name!r}: ranks have shape {ranks.shape}, not (num_experts,)")
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(
        ("routing", "importance", "importance_count"), ranks.shape
    )
    prunes = config.policy == "prune"
    shapes["dimensions"] = (ranks.size, config.r_max) if prunes else None
    for field, shape in shapes.items():
        found = getattr(getattr(values, field), "shape", None)
        if found != shape:
            raise LayoutError(f"layer {name!r}: {field} has shape {found}, not {shape}")
    least = 1 if prunes else config.starting_rank
    if ranks.min() < least or ranks.max() > config.r_max:
        found = f"{ranks.min()}..{ranks.max()}"
        raise LayoutError(f"layer {name!r}: ranks lie in {found}, not {least}..{config.r_max}")
    total, ceiling = int(ranks.sum()), ranks.size * config.mean_rank_ceiling
    if config.scope == "global" and total > ceiling:
        raise LayoutError(f"layer {name!r}: ranks sum to {total}, above its ceiling of {ceiling}")
    return LayerState(**dict(values))


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
