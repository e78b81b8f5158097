"""One growth (or pruning) event: from the layers' states to a decision, as pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from drlora_core import layer, pruning, timetable
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.layer import LayerState
from drlora_core.policies import AllocationRequest, Policy, run_policy
from drlora_core.pools import Pool, allocate, layer_means, make_pools
from drlora_core.saliency import saliency

Layers = Mapping[str, LayerState]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GrowthEvent:
    """The decision of one event; all mappings are by layer name, arrays are [N]."""

    step: int
    """Optimizer step after which it happened, counted from 1."""
    index: int
    """k, the number of the event, counted from 1."""
    deltas: Mapping[str, IntArray]
    """Change of each expert's rank, int64; negative with policy ``prune``."""
    ranks: Mapping[str, IntArray]
    """Ranks after the event, int64."""
    saliency: Mapping[str, FloatArray]
    """S before the event, by which experts were ordered, float64."""
    unplaced: int
    """Rank units that limits left over, carried to the next event (all layers)."""
    cut: Mapping[str, NDArray[np.bool_]]
    """Policy ``prune`` only: the dimensions cut, bool [N, r_max], numbered as before the event."""


def decide(
    config: AllocatorConfig,
    policy: Policy | None,
    layers: Layers,
    carry: tuple[int, ...],
    step: int,
) -> tuple[GrowthEvent | None, Layers, tuple[int, ...]]:
    """Decide the event after optimizer step ``step``, if there is one.

    Args:
        config: the configuration.
        policy: the growth policy; None for policy ``prune``.
        layers: the states of all layers.
        carry: units that each pool carried over from earlier events.
        step: the optimizer step, from 1.

    Returns:
        The event or None, the new states of the layers, and the units that each pool carries over.
    """
    index = timetable.event_index(
        step, config.warmup_steps, config.growth_interval, config.growth_end
    )
    if index is None:
        return None, layers, carry
    pools = make_pools(config, {name: state.num_experts for name, state in layers.items()})
    signals = {name: layer.signals(state, config) for name, state in layers.items()}
    scores = {
        name: saliency(*signals[name], state.ranks, config.gamma) for name, state in layers.items()
    }
    after: dict[str, LayerState] = {}
    cut: dict[str, NDArray[np.bool_]] = {}
    left_over = []
    for number, (pool, carried) in enumerate(zip(pools, carry, strict=True)):
        members = {name: layers[name] for name in pool.names}
        if policy is None:
            pruned, cut_here = _prune(config, members, index)
            after |= pruned
            cut |= cut_here
            left_over.append(0)
        else:
            ranks = np.concatenate([state.ranks for state in members.values()])
            available = event_quota(config, pool, index) + carried
            quota = min(available, pool.num_experts * config.r_target - int(ranks.sum()))
            request = _make_request(config, pool, ranks, quota, signals, scores, step, number)
            grown, left = _grow(config, policy, members, pool, request, index)
            after |= grown
            left_over.append(left)
    event = GrowthEvent(
        step=step,
        index=index,
        deltas={name: after[name].ranks - state.ranks for name, state in layers.items()},
        ranks={name: after[name].ranks.copy() for name in layers},
        saliency=scores,
        unplaced=sum(left_over),
        cut=cut,
    )
    return event, {name: after[name] for name in layers}, tuple(left_over)


def _grow(
    config: AllocatorConfig,
    policy: Policy,
    members: Layers,
    pool: Pool,
    request: AllocationRequest,
    index: int,
) -> tuple[dict[str, LayerState], int]:
    """Spread a pool's quota; return the new states and the units left over."""
    if config.scope == "global":
        floors, capacities = _compute_bounds(config, pool, request.ranks, index)
        growth = allocate(policy, request, pool, floors, capacities)
    else:
        growth = run_policy(policy, request, pool.describe())
    after = {
        name: layer.grow(state, growth[part])
        for (name, state), part in zip(members.items(), pool.slices(), strict=True)
    }
    return after, request.quota - int(growth.sum())


def event_quota(config: AllocatorConfig, pool: Pool, index: int) -> int:
    """Quota of event k without carried units: Q per layer, or the even schedule's share."""
    if config.policy == "uniform":
        return 0
    if config.quota is not None:
        return config.quota * len(pool.names)
    budget = pool.num_experts * (config.r_target - config.r_init)
    return timetable.even_quota(index, config.num_events, budget)


def _make_request(
    config: AllocatorConfig,
    pool: Pool,
    ranks: IntArray,
    quota: int,
    signals: Mapping[str, tuple[FloatArray, FloatArray]],
    scores: Mapping[str, FloatArray],
    step: int,
    number: int,
) -> AllocationRequest:
    scale = np.ones(pool.num_experts)
    if config.scope == "global":
        scale = layer_means(np.concatenate([scores[name] for name in pool.names]), pool)
    room = config.r_max - ranks
    return AllocationRequest(
        step=step,
        quota=quota,
        ranks=ranks,
        limits=room if config.max_growth is None else np.minimum(room, config.max_growth),
        routing=np.concatenate([signals[name][0] for name in pool.names]),
        importance=np.concatenate([signals[name][1] for name in pool.names]),
        gamma=config.gamma,
        scale=scale,
        seed=(config.seed, step, number),
    )


def _compute_bounds(
    config: AllocatorConfig, pool: Pool, ranks: IntArray, index: int
) -> tuple[IntArray, IntArray]:
    """Scope ``global``: the fewest and the most units each layer may get, [layers]."""
    totals = np.array([ranks[part].sum() for part in pool.slices()])
    sizes = np.array(pool.sizes)
    share = [
        event_quota(config, Pool((name,), (size,)), index)
        for name, size in zip(pool.names, pool.sizes, strict=True)
    ]
    capacities = sizes * config.mean_rank_ceiling - totals
    floors = np.floor(config.layer_floor * np.array(share)).astype(np.int64)
    return np.minimum(floors, capacities), capacities


def _prune(
    config: AllocatorConfig, members: Layers, index: int
) -> tuple[dict[str, LayerState], dict[str, NDArray[np.bool_]]]:
    """Cut the pool's least important dimensions, down to the cubic schedule's total."""
    states = list(members.values())
    ranks = np.concatenate([state.ranks for state in states])
    averages = np.concatenate([layer.dimension_importance(state, config) for state in states])
    cut = pruning.least_important(
        averages, ranks, int(ranks.sum()) - config.scheduled_total(ranks.size, index)
    )
    ends = np.cumsum([state.num_experts for state in states])[:-1]
    parts = dict(zip(members, np.split(cut, ends), strict=True))
    after = {
        name: dataclasses.replace(
            state,
            ranks=state.ranks - parts[name].sum(axis=1),
            dimensions=pruning.compact(state.dimensions, parts[name]),
        )
        for name, state in members.items()
        if state.dimensions is not None
    }
    return after, parts
