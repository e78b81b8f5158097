"""The samples that all layers take in one step, in the forms that ``observe_all`` accepts.

Shapes: L layers of N experts, R = r_max rank dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core.config import AllocatorConfig
from drlora_core.ema import IntArray
from drlora_core.errors import StatisticError, check_layer
from drlora_core.state import Sample, State, check_sample

ByLayer = Mapping[str, ArrayLike]
Given = ArrayLike | ByLayer | None
Tokens = int | Sequence[int] | Mapping[str, int] | None


def split_layers(kind: str, given: Given, layers: Sequence[str]) -> ByLayer | None:
    """Return each layer's own part by name, [N] or [N, R]. None stays None."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        for name in given:
            check_layer(name, layers)
        return given
    try:
        rows = np.asarray(given)
    except ValueError as error:
        raise StatisticError(f"{kind} is not an array of numbers: {error}") from error
    if rows.ndim < 2 or len(rows) != len(layers):
        raise StatisticError(
            f"{kind} has shape {rows.shape}; accepted: a row for each of the {len(layers)} layers, "
            f"in the order of engine.layer_names, or a mapping from layer name to array"
        )
    return dict(zip(layers, rows, strict=True))


def split_tokens(given: Tokens, layers: Sequence[str]) -> Mapping[str, int]:
    """Return each layer's counted tokens by name, as far as they are known."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        for name in given:
            check_layer(name, layers)
        return given
    if isinstance(given, (int, np.integer)):
        return dict.fromkeys(layers, int(given))
    if len(given) != len(layers):
        raise StatisticError(f"tokens holds {len(given)} numbers, not one for {len(layers)} layers")
    return {name: int(count) for name, count in zip(layers, given, strict=True)}


def pair(
    routing: ByLayer | None, importance: ByLayer | None, layers: Sequence[str]
) -> dict[str, tuple[ArrayLike | None, ArrayLike | None]]:
    """Pair routing and importance of the layers that have a sample, in the engine's order."""
    pairs: dict[str, tuple[ArrayLike | None, ArrayLike | None]] = {}
    for name in layers:
        has_routing, has_importance = (
            given is None or name in given for given in (routing, importance)
        )
        if has_routing != has_importance:
            has, lacks = ("routing", "importance") if has_routing else ("importance", "routing")
            raise StatisticError(
                f"layer {name!r} has {has} but no {lacks}; give both, or neither to skip the layer"
            )
        if has_routing:
            pairs[name] = (
                None if routing is None else routing[name],
                None if importance is None else importance[name],
            )
    return pairs


def check_one(
    where: str,
    ranks: IntArray,
    config: AllocatorConfig,
    routing: ArrayLike | None,
    importance: ArrayLike | None,
) -> Sample:
    """Check the sample of one layer; errors begin with ``where``."""
    try:
        return check_sample(ranks, config, routing, importance)
    except StatisticError as error:
        raise StatisticError(f"{where}: {error}") from None


def check_together(
    state: State, config: AllocatorConfig, routing: Given, importance: Given
) -> Sample | None:
    """Check the samples of all layers as one; None if they have to be checked layer by layer.

    That is so if a sample is wrong, which then is named, or missing, and for importance [N, R]:
    that of a layer fits into a processor's cache, that of all layers does not.
    """
    try:
        joined = (None if given is None else _join(given, state) for given in (routing, importance))
        return check_sample(state.ranks, config, *joined)
    except (KeyError, ValueError):
        return None


def _join(given: ArrayLike | ByLayer, state: State) -> NDArray[np.generic]:
    """Join samples [N] of all layers to [E]; an array [L, N] is not copied."""
    if isinstance(given, Mapping):
        samples = [np.asarray(given[name]) for name in state.places]
    else:
        rows = np.asarray(given)
        samples = list(rows)
    if [sample.shape for sample in samples] != [(size,) for size in state.sizes.values()]:
        raise ValueError("a sample has another shape than [N]")
    return np.concatenate(samples) if isinstance(given, Mapping) else rows.reshape(-1)
