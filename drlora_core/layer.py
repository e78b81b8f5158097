"""State of one MoE layer: its statistics and ranks, and the pure updates of them.

Shapes: N experts, R = r_max rank dimensions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from drlora_core import ema
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import StatisticError
from drlora_core.saliency import active_dimensions, mean_over_active, saliency


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """The state of one layer. Arrays are replaced, never modified in place."""

    ranks: IntArray  # [N]
    routing: FloatArray  # [N], moving average of phi, not bias-corrected
    routing_count: int  # updates of `routing`
    importance: FloatArray  # [N], moving average of mean s_j, not bias-corrected
    importance_count: IntArray  # [N], updates of `importance` since start or reset
    dimensions: FloatArray | None  # [N, R], moving average of s_j; policy `prune` only
    observed: bool  # the current step's sample was taken or skipped

    @property
    def num_experts(self) -> int:
        return self.ranks.size


def make_state(config: AllocatorConfig, num_experts: int) -> LayerState:
    """Make the first state: every expert at the starting rank, every average at 0."""
    prunes = config.policy == "prune"
    return LayerState(
        ranks=np.full(num_experts, config.starting_rank, dtype=np.int64),
        routing=np.zeros(num_experts),
        routing_count=0,
        importance=np.zeros(num_experts),
        importance_count=np.zeros(num_experts, dtype=np.int64),
        dimensions=np.zeros((num_experts, config.r_max)) if prunes else None,
        observed=False,
    )


def has_sample(state: LayerState) -> bool:
    """True if routing was observed, or importance since it was reset."""
    return state.routing_count > 0 or bool(state.importance_count.any())


def observe(
    state: LayerState,
    config: AllocatorConfig,
    routing: ArrayLike | None,
    importance: ArrayLike | None,
) -> LayerState:
    """Update the averages with one sample of phi [N] and of importance [N] or [N, R]."""
    new: dict[str, Any] = {"observed": True}
    if routing is not None:
        phi = _check("routing", _to_floats("routing", routing), [(state.num_experts,)])
        new["routing"] = ema.update(state.routing, phi, config.routing_decay)
        new["routing_count"] = state.routing_count + 1
    elif config.use_routing:
        raise StatisticError("routing is missing; it may be None only with use_routing=False")
    if importance is not None:
        mean, sample = _check_importance(state, config, importance)
        new["importance"] = ema.update(state.importance, mean, config.importance_decay)
        new["importance_count"] = state.importance_count + 1
        if state.dimensions is not None:
            new["dimensions"] = ema.update(state.dimensions, sample, config.importance_decay)
    elif config.use_importance or state.dimensions is not None:
        raise StatisticError("importance is missing; it may be None only with use_importance=False")
    return dataclasses.replace(state, **new)


def _check_importance(
    state: LayerState, config: AllocatorConfig, importance: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Return the mean over each expert's dimensions, [N], and the checked sample."""
    per_dimension = (state.num_experts, config.r_max)
    sample = _to_floats("importance", importance)
    if sample.shape == per_dimension:
        active = active_dimensions(state.ranks, config.r_max)
        sample = _check("importance", np.where(active, sample, 0.0), [per_dimension])
        with np.errstate(over="ignore"):
            mean = mean_over_active(sample, state.ranks)
        return _check("mean importance", mean, [mean.shape]), sample
    if state.dimensions is not None:
        raise StatisticError(
            f"importance has shape {sample.shape}; policy 'prune' needs that of every rank "
            f"dimension, shape {per_dimension} = (num_experts, r_max)"
        )
    sample = _check("importance", sample, [(state.num_experts,), per_dimension])
    return sample, sample


def _to_floats(kind: str, sample: ArrayLike) -> FloatArray:
    try:
        values = np.asarray(sample)
        if values.dtype.kind in "SUc":
            raise TypeError(f"it holds {values.dtype}")
        return values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise StatisticError(f"{kind} is not an array of numbers: {error}") from error


def _check(kind: str, values: FloatArray, shapes: list[tuple[int, ...]]) -> FloatArray:
    if values.shape not in shapes:
        accepted = " or ".join(str(shape) for shape in shapes)
        raise StatisticError(f"{kind} has shape {values.shape}; accepted: {accepted}")
    # One comparison catches negative, infinite and NaN values: with NaN both sides are False.
    if not (values.min() >= 0.0 and values.max() < np.inf):
        index = np.argwhere(~((values >= 0.0) & (values < np.inf)))[0].tolist()
        raise StatisticError(
            f"{kind}{index} is {values[tuple(index)]}; accepted: finite numbers >= 0"
        )
    return values


def routing_frequency(state: LayerState, config: AllocatorConfig) -> FloatArray:
    """f_i = average / (1 - beta_f^n), float64 [N]; 0 before the first sample."""
    return ema.correct_bias(state.routing, state.routing_count, config.routing_decay)


def rank_importance(state: LayerState, config: AllocatorConfig) -> FloatArray:
    """g_i = average / (1 - beta_g^n_i), float64 [N]; 0 before the first sample."""
    return ema.correct_bias(state.importance, state.importance_count, config.importance_decay)


def dimension_importance(state: LayerState, config: AllocatorConfig) -> FloatArray:
    """s_j averaged like g and bias-corrected, float64 [N, R]; policy ``prune`` only."""
    if state.dimensions is None:
        raise AssertionError("only policy 'prune' averages single dimensions")
    counts = state.importance_count[:, None]  # layers may have skipped different steps
    return ema.correct_bias(state.dimensions, counts, config.importance_decay)


def signals(state: LayerState, config: AllocatorConfig) -> tuple[FloatArray, FloatArray]:
    """Return f and g as the saliency uses them: 1 where the configuration switches one off."""
    one = np.ones(state.num_experts)
    routing = routing_frequency(state, config) if config.use_routing else one
    return routing, rank_importance(state, config) if config.use_importance else one


def layer_saliency(state: LayerState, config: AllocatorConfig) -> FloatArray:
    return saliency(*signals(state, config), state.ranks, config.gamma)


def grow(state: LayerState, growth: IntArray) -> LayerState:
    """Add growth [N] to the ranks; g and its count restart for the experts that grew, f stays."""
    unchanged = growth == 0
    return dataclasses.replace(
        state,
        ranks=state.ranks + growth,
        importance=np.where(unchanged, state.importance, 0.0),
        importance_count=np.where(unchanged, state.importance_count, 0),
    )
