"""Starting ranks from a profile: the statistics of a model before it is trained.

A starting policy is a :class:`~drlora_core.policies.Policy` that is called once per layer, with
ranks 0, the layer's budget N * r_target as quota, and r_max as limits. Its request holds the means
of the profile as they are: NaN where they were not recorded.

Shapes: T steps, N experts of a layer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError, PolicyError, StatisticError, near_misses
from drlora_core.policies import (
    AllocationRequest,
    Policy,
    policy_name,
    proportional,
    run_policy,
)
from drlora_core.recording.data import LayerRecord, Recording

Pair = tuple[FloatArray, FloatArray]
"""f and g of a layer's experts, float64 [N] each."""
Statistics = Recording | str | os.PathLike[str] | Mapping[str, tuple[ArrayLike, ArrayLike | None]]
"""A recording, the path of one, or f and g by layer (None for a g that is not known)."""


def sieve(request: AllocationRequest, *, fraction: float = 0.25) -> IntArray:
    """Give the experts with the largest f one rank, the others none (MoE-Sieve, arXiv 2603.24044).

    Of N experts, round(fraction * N) get quota // count each. Ties go to the smaller index.

    Raises:
        PolicyError: routing was not recorded, ``fraction`` is out of range, or the rank exceeds
            ``r_max``.

    Example:
        >>> from drlora_core.testing import make_request
        >>> request = make_request(8, [0] * 4, [8] * 4, routing=[0.1, 0.4, 0.2, 0.3])
        >>> sieve(request).tolist(), sieve(request, fraction=0.5).tolist()
        ([0, 8, 0, 0], [0, 4, 0, 4])
    """
    routing = _known("routing", request.routing)
    if not 0.0 < fraction <= 1.0:
        raise PolicyError(f"fraction is {fraction}; accepted: above 0, up to 1")
    count = max(round(fraction * routing.size), 1)
    rank, most = request.quota // count, int(request.limits.min())
    if rank > most:
        needed = (request.quota // (most + 1) + 1) / routing.size
        raise PolicyError(
            f"it gives {count} of {routing.size} experts rank {rank}, above r_max {most}; use "
            f"r_max >= {rank}, or functools.partial(sieve, fraction={needed:.4g}) or more"
        )
    ranks = np.zeros_like(request.ranks)
    ranks[np.argsort(-routing, kind="stable")[:count]] = rank
    return ranks


def profile(request: AllocationRequest) -> IntArray:
    """Give ranks in proportion to f, rounded by largest remainder; r_max limits each.

    Example:
        >>> from drlora_core.testing import make_request
        >>> profile(make_request(8, [0] * 3, [8] * 3, routing=[0.5, 0.3, 0.2])).tolist()
        [4, 2, 2]
    """
    return _in_proportion(request, _known("routing", request.routing))


def gradient(request: AllocationRequest) -> IntArray:
    """Give ranks in proportion to g, rounded by largest remainder; r_max limits each."""
    return _in_proportion(request, _known("importance", request.importance))


def _in_proportion(request: AllocationRequest, scores: FloatArray) -> IntArray:
    one = np.ones_like(scores)
    return proportional(
        dataclasses.replace(request, routing=scores, importance=one, scale=one, gamma=0.0)
    )


def _known(kind: str, values: FloatArray) -> FloatArray:
    if np.isnan(values).any():
        raise PolicyError(f"the profile holds no {kind}, which this policy needs")
    return values


STARTING_POLICIES: Mapping[str, Policy] = MappingProxyType(
    {policy.__name__: policy for policy in (sieve, profile, gradient)}
)


def starting_ranks(
    config: AllocatorConfig, statistics: Statistics, policy: str | Policy = "sieve"
) -> dict[str, IntArray]:
    """Ranks that a starting policy gives to the experts of each layer, int64 [N].

    Raises:
        LayoutError, PolicyError, StatisticError: as ``AllocatorEngine.from_profile``.
    """
    if config.policy == "prune":
        raise LayoutError(
            "policy 'prune' starts every expert at r_init; a profile goes with policy 'uniform' "
            "(ranks stay) or a growing one with r_init=0"
        )
    chosen = _choose(policy)
    found = {}
    for number, (name, (routing, importance)) in enumerate(mean_statistics(statistics).items()):
        size = routing.size
        request = AllocationRequest(
            step=0,
            quota=size * config.r_target,
            ranks=np.zeros(size, dtype=np.int64),
            limits=np.full(size, config.r_max, dtype=np.int64),
            routing=routing,
            importance=importance,
            gamma=config.gamma,
            scale=np.ones(size),
            seed=(config.seed, 0, number),
        )
        found[name] = run_policy(chosen, request, f"layer {name!r}")
        least = int(found[name].min())
        if least < config.least_rank:
            field = "r_min" if config.policy == "move" else "r_init"
            raise LayoutError(
                f"layer {name!r}: starting policy {policy_name(chosen)!r} gives an expert rank "
                f"{least}, below {field} {config.least_rank}; use {field}=0"
            )
    return found


def mean_statistics(statistics: Statistics) -> dict[str, Pair]:
    """f and g of each layer: means over the recorded steps, weighted by tokens where known.

    While an expert had no rank, its share of f stands for its importance.

    NaN stands for what was not recorded.

    Example:
        >>> routing = {"experts": [[0.9, 0.1], [0.5, 0.5]]}
        >>> recording = Recording.from_arrays(routing, tokens=[10, 30])
        >>> f, g = mean_statistics(recording)["experts"]
        >>> f.round(3).tolist(), g.tolist()
        ([0.6, 0.4], [nan, nan])
    """
    if isinstance(statistics, (str, os.PathLike)):
        statistics = Recording.open(statistics)
    if isinstance(statistics, Mapping):
        if not statistics:
            raise LayoutError("the profile has no layers")
        return {name: _check_pair(name, pair) for name, pair in statistics.items()}
    if not isinstance(statistics, Recording):
        raise LayoutError(
            "statistics must be a Recording, the path of one, or a mapping from layer to (f, g), "
            f"got {type(statistics).__name__}"
        )
    layers = [statistics.layer(name) for name in statistics.layers]
    return {
        layer.name: (_mean(layer, layer.routing_at), _mean(layer, layer.importance_at))
        for layer in layers
    }


def _mean(layer: LayerRecord, sample_at: Callable[[int], FloatArray | None]) -> FloatArray:
    """Mean of the samples [N] that were recorded; NaN if none was."""
    samples = {
        row: sample for row in range(layer.tokens.size) if (sample := sample_at(row)) is not None
    }
    if not samples:
        return np.full(layer.routing.shape[1], np.nan)
    weights = layer.tokens[list(samples)].astype(np.float64)
    if (weights <= 0.0).any():  # unknown
        weights[:] = 1.0
    return np.average(np.stack(list(samples.values())), axis=0, weights=weights)


def _check_pair(name: str, pair: tuple[ArrayLike, ArrayLike | None]) -> Pair:
    try:
        routing, given = pair
        f = np.array(routing, dtype=np.float64)
        g = np.full(f.shape, np.nan) if given is None else np.array(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise StatisticError(f"layer {name!r}: not a pair of arrays (f, g): {error}") from error
    if f.ndim != 1 or not f.size or f.shape != g.shape:
        raise LayoutError(
            f"layer {name!r}: f has shape {f.shape} and g {g.shape}; accepted: one number per "
            "expert in both"
        )
    for kind, values, known in (("f", f, True), ("g", g, given is not None)):
        wrong = ~((values >= 0.0) & (values < np.inf))
        if known and wrong.any():
            expert = int(wrong.argmax())
            raise StatisticError(
                f"layer {name!r}: {kind} of expert {expert} is {values[expert]}; accepted: finite "
                "numbers >= 0"
            )
    return f, g


def _choose(policy: str | Policy) -> Policy:
    if isinstance(policy, str):
        if policy not in STARTING_POLICIES:
            raise PolicyError(
                f"no starting policy {policy!r}; {near_misses(policy, STARTING_POLICIES)}"
            )
        return STARTING_POLICIES[policy]
    if not callable(policy):
        raise PolicyError(
            f"policy must be a name ({', '.join(STARTING_POLICIES)}) or a callable that takes an "
            f"AllocationRequest, got {policy!r}"
        )
    return policy
