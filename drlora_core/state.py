"""State of all MoE layers: their ranks and statistics, and the updates of them.

The experts of all layers lie in one array, one layer after the other, so that one call of NumPy
serves every layer.

Shapes: L layers, E experts of all layers, N experts of one layer, R = r_max rank dimensions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core import ema, pruning
from drlora_core.bounds import MOST_DIMENSIONS
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError, StatisticError, StepOrderError
from drlora_core.saliency import (
    importance_at_zero,
    mask_inactive,
    mean_over_active,
    saliency,
)

LARGEST = 1e100
"""Largest value of a sample or an average: products of two are finite."""


class Place(NamedTuple):
    """Where a layer is in the state."""

    layer: int | slice  # in arrays [L]
    experts: slice  # in arrays [E]


EVERYWHERE = Place(slice(None), slice(None))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class State:
    """The state of all layers.

    ``observe`` writes the averages and counts in place; ranks are replaced, never modified.
    """

    places: Mapping[str, Place]
    ranks: IntArray  # [E]
    routing: FloatArray  # [E], moving average of phi, not bias-corrected
    routing_count: IntArray  # [L], updates of `routing`
    importance: FloatArray  # [E], moving average of mean s_j, not bias-corrected
    importance_count: IntArray  # [E], updates of `importance` since start or reset
    dimensions: FloatArray | None  # [E, R], moving average of s_j; if config.cuts
    observed: NDArray[np.bool_]  # [L], the current step's sample was taken or skipped

    @property
    def sizes(self) -> dict[str, int]:
        """Number of experts of each layer."""
        return {name: part.stop - part.start for name, (_, part) in self.places.items()}


class Sample(NamedTuple):
    """A checked sample of N experts."""

    phi: FloatArray | None  # [N]
    importance: FloatArray | None  # [N], mean over the active dimensions
    dimensions: FloatArray | None  # [N, R]; if config.cuts


def place_layers(sizes: Mapping[str, int]) -> dict[str, Place]:
    """Place layers one after the other."""
    ends = itertools.accumulate(sizes.values())
    return {
        name: Place(index, slice(end - size, end))
        for index, ((name, size), end) in enumerate(zip(sizes.items(), ends, strict=True))
    }


def check_dimensions(config: AllocatorConfig, experts: int) -> None:
    """Refuse more rank dimensions of all experts than fit into memory; only some policies have any.

    Raises:
        LayoutError: says how many are accepted.
    """
    if config.cuts and experts * config.r_max > MOST_DIMENSIONS:
        raise LayoutError(
            f"policy {config.policy!r} stores the importance of {experts} experts x r_max "
            f"{config.r_max} rank dimensions; accepted: at most {MOST_DIMENSIONS} of them, which "
            "take 1 GiB; use a smaller r_max"
        )


def make_state(config: AllocatorConfig, ranks: Mapping[str, IntArray]) -> State:
    """Make the first state from the starting ranks of each layer, [N]: every average is 0."""
    places = place_layers({name: start.size for name, start in ranks.items()})
    joined = np.concatenate([*ranks.values(), np.zeros(0, dtype=np.int64)])
    size = joined.size
    check_dimensions(config, size)
    return State(
        places=places,
        ranks=joined,
        routing=np.zeros(size),
        routing_count=np.zeros(len(places), dtype=np.int64),
        importance=np.zeros(size),
        importance_count=np.zeros(size, dtype=np.int64),
        dimensions=np.zeros((size, config.r_max)) if config.cuts else None,
        observed=np.zeros(len(places), dtype=np.bool_),
    )


def count_updates(state: State) -> IntArray:
    """Updates of routing, and of importance since its reset, of each expert, int64 [E]."""
    return state.importance_count + _spread(state.routing_count, state)


def _spread(values: IntArray, state: State) -> IntArray:
    """Repeat each layer's number for its experts, [L] -> [E]."""
    return np.repeat(values, list(state.sizes.values()))


def check_sample(
    ranks: IntArray,
    config: AllocatorConfig,
    routing: ArrayLike | None,
    importance: ArrayLike | None,
) -> Sample:
    """Check samples of phi [N] and of importance [N] or [N, R] of experts with ``ranks`` [N]."""
    phi = mean = dimensions = None
    if routing is not None:
        phi = _check("routing", to_floats("routing", routing), [ranks.shape])
    elif config.use_routing:
        raise StatisticError("routing is missing; it may be None only with use_routing=False")
    if importance is not None:
        mean, dimensions = _check_importance(ranks, config, importance)
    elif config.use_importance or config.cuts:
        raise StatisticError("importance is missing; it may be None only with use_importance=False")
    return Sample(phi, mean, dimensions)


def observe(state: State, config: AllocatorConfig, place: Place, sample: Sample) -> None:
    """Update the averages of a layer, or of all, with a checked sample; in place."""
    layer, experts = place
    if sample.phi is not None:
        ema.update(state.routing[experts], sample.phi, config.routing_decay)
        state.routing_count[layer] += 1
    if sample.importance is not None:
        ema.update(state.importance[experts], sample.importance, config.importance_decay)
        state.importance_count[experts] += 1
        if config.least_rank == 0:
            state.importance_count[experts][state.ranks[experts] == 0] = 0
    if state.dimensions is not None and sample.dimensions is not None:
        ema.update(state.dimensions[experts], sample.dimensions, config.importance_decay)
    state.observed[layer] = True


def _check_importance(
    ranks: IntArray, config: AllocatorConfig, importance: ArrayLike
) -> tuple[FloatArray, FloatArray | None]:
    """Return the mean over each expert's dimensions, [N]; if ranks are cut, the dimensions too."""
    per_dimension = (ranks.size, config.r_max)
    sample = to_floats("importance", importance)
    if sample.shape == per_dimension:
        sample = _check("importance", mask_inactive(sample, ranks), [per_dimension])
        return mean_over_active(sample, ranks), sample if config.cuts else None
    if config.cuts:
        raise StatisticError(
            f"importance has shape {sample.shape}; policy {config.policy!r} needs that of every "
            f"rank dimension, shape {per_dimension} = (num_experts, r_max)"
        )
    if config.least_rank == 0 and sample.shape == ranks.shape:
        sample = np.where(ranks > 0, sample, 0.0)  # without a dimension there is nothing to measure
    return _check("importance", sample, [ranks.shape, per_dimension]), None


def to_floats(kind: str, sample: ArrayLike) -> FloatArray:
    """Return an array as float64, a view if it is; NumPy would also convert texts and dates."""
    try:
        values = np.asarray(sample)
        if values.dtype.kind in "SUcMm" or values.dtype.names:
            raise TypeError(f"it holds {values.dtype}")
        return values.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise StatisticError(f"{kind} is not an array of numbers: {error}") from error


def _check(kind: str, values: FloatArray, shapes: list[tuple[int, ...]]) -> FloatArray:
    if values.shape not in shapes:
        accepted = " or ".join(str(shape) for shape in shapes)
        raise StatisticError(f"{kind} has shape {values.shape}; accepted: {accepted}")
    # One comparison catches negative, infinite and NaN values: with NaN both sides are False.
    if not (values.min() >= 0.0 and values.max() <= LARGEST):
        index = np.argwhere(~((values >= 0.0) & (values <= LARGEST)))[0].tolist()
        raise StatisticError(
            f"{kind}{index} is {values[tuple(index)]}; accepted: finite numbers >= 0, at most "
            f"{LARGEST:g}"
        )
    return values


def routing_frequency(
    state: State, config: AllocatorConfig, place: Place = EVERYWHERE
) -> FloatArray:
    """f_i = average / (1 - beta_f^n), float64 [N]; 0 before the first sample."""
    counts = state.routing_count[place.layer]
    if place is EVERYWHERE:
        counts = _spread(counts, state)
    return ema.correct_bias(state.routing[place.experts], counts, config.routing_decay)


def rank_importance(state: State, config: AllocatorConfig, place: Place = EVERYWHERE) -> FloatArray:
    """g_i = average / (1 - beta_g^n_i), float64 [N]; 0 before the first sample.

    That of an expert of rank 0 is :func:`drlora_core.saliency.importance_at_zero`.
    """
    ranks, counts = state.ranks[place.experts], state.importance_count[place.experts]
    measured = ema.correct_bias(state.importance[place.experts], counts, config.importance_decay)
    if ranks.all():
        return measured
    sizes = list(state.sizes.values()) if place is EVERYWHERE else [ranks.size]
    routing = used_routing(state, config, place)
    return np.where(ranks > 0, measured, importance_at_zero(routing, measured, counts > 0, sizes))


def used_routing(state: State, config: AllocatorConfig, place: Place = EVERYWHERE) -> FloatArray:
    """f as the saliency uses it, float64 [N]: 1 where the configuration switches it off."""
    if not config.use_routing:
        return np.ones(state.ranks[place.experts].size)
    return routing_frequency(state, config, place)


def dimension_importance(state: State, config: AllocatorConfig) -> FloatArray:
    """s_j averaged like g and bias-corrected, float64 [E, R]; if ``config.cuts``."""
    if state.dimensions is None:
        raise AssertionError("only policies that cut average single dimensions")
    counts = state.importance_count[:, None]  # layers may have skipped different steps
    return ema.correct_bias(state.dimensions, counts, config.importance_decay)


def signals(
    state: State, config: AllocatorConfig, place: Place = EVERYWHERE
) -> tuple[FloatArray, FloatArray]:
    """Return f and g as the saliency uses them: 1 where the configuration switches one off."""
    routing = used_routing(state, config, place)
    if not config.use_importance:
        return routing, np.ones_like(routing)
    return routing, rank_importance(state, config, place)


def expert_saliency(state: State, config: AllocatorConfig, place: Place = EVERYWHERE) -> FloatArray:
    """S of a layer's experts, or of all, float64 [N]."""
    return saliency(*signals(state, config, place), state.ranks[place.experts], config.gamma)


def grow(state: State, growth: IntArray) -> State:
    """Add growth [E] to the ranks; g and its count restart for the experts that grew, f stays.

    The averages of their single dimensions restart too: they share the count.
    """
    unchanged, dimensions = growth == 0, state.dimensions
    if dimensions is not None:
        dimensions = np.where(unchanged[:, None], dimensions, 0.0)
    return dataclasses.replace(
        state,
        ranks=state.ranks + growth,
        importance=np.where(unchanged, state.importance, 0.0),
        importance_count=np.where(unchanged, state.importance_count, 0),
        dimensions=dimensions,
    )


def cut(state: State, marked: NDArray[np.bool_]) -> State:
    """Cut dimensions, bool [E, R]; g and its count restart for experts that have none left."""
    ranks, dimensions = state.ranks - marked.sum(axis=1), state.dimensions
    emptied = ranks == 0
    return dataclasses.replace(
        state,
        ranks=ranks,
        importance=np.where(emptied, 0.0, state.importance),
        importance_count=np.where(emptied, 0, state.importance_count),
        dimensions=None if dimensions is None else pruning.compact(dimensions, marked),
    )


def check_all_observed(state: State, step: int) -> None:
    """Refuse to close a step that lacks the sample of a layer, or without any layer."""
    if not state.places:
        raise StepOrderError("the engine has no layers; call engine.add_layer(...) first")
    if not state.observed.all():
        missing = np.flatnonzero(~state.observed)
        raise StepOrderError(
            f"step {step} has no sample of {missing.size} of {len(state.places)} layers, first "
            f"{list(state.places)[missing[0]]!r}; call engine.observe(...) or engine.skip(name) "
            f"for every layer before engine.step()"
        )


def check_unobserved(state: State, layer: int | slice, name: str, step: int) -> None:
    """Refuse a second sample of a layer in one step."""
    if state.observed[layer]:
        raise StepOrderError(
            f"layer {name!r} was already observed in step {step}; average the "
            f"micro-batches, call engine.observe({name!r}, ...) once, then engine.step()"
        )
