"""One growth (or pruning) event: from the layers' states to a decision, as pure functions."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from drlora_core import layer, pruning, timetable
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.layer import LayerState
from drlora_core.policies import AllocationRequest, Policy, run_policy
from drlora_core.pools import Pool, allocate, layer_means, make_pools

Layers = Mapping[str, LayerState]
logger = logging.getLogger(__name__)


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
    """Decide the event after optimizer step ``step`` (from 1), if there is one.

    The policy is None for ``prune``; ``carry`` holds the units that each pool carried over. Returns
    the event or None, the new states of the layers, and the units that each pool carries over. A
    pool of which no sample has been seen waits: its units are carried over, nothing is cut.
    """
    index = timetable.event_index(
        step, config.warmup_steps, config.growth_interval, config.growth_end
    )
    if index is None:
        return None, layers, carry
    pools = make_pools(config, {name: state.num_experts for name, state in layers.items()})
    scores = {name: layer.layer_saliency(state, config) for name, state in layers.items()}
    after: dict[str, LayerState] = {}
    cut: dict[str, NDArray[np.bool_]] = {}
    left_over = []
    for number, (pool, carried) in enumerate(zip(pools, carry, strict=True)):
        members = {name: layers[name] for name in pool.names}
        seen = _has_sample(members, pool, step)
        if policy is None:
            pruned, cut_here = _prune(config, members, index if seen else 0)
            after |= pruned
            cut |= cut_here
            left_over.append(0)
            continue
        units = event_quota(config, pool, index) + carried
        request = _make_request(config, pool, members, scores, units, step, number)
        growth = np.zeros_like(request.ranks)
        if seen:
            growth = _spread(config, policy, pool, request, index)
        for name, part in zip(pool.names, pool.slices(), strict=True):
            after[name] = layer.grow(layers[name], growth[part])
        left_over.append(request.quota - int(growth.sum()))
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


def _has_sample(members: Layers, pool: Pool, step: int) -> bool:
    """True if a sample of a pool has been seen; its event waits otherwise, and says so."""
    seen = any(layer.has_sample(state) for state in members.values())
    if not seen:
        logger.warning(
            "the event after step %d leaves the ranks of %s as they are: no sample of routing or "
            "importance has been seen",
            step,
            pool.describe(),
        )
    return seen


def _spread(
    config: AllocatorConfig, policy: Policy, pool: Pool, request: AllocationRequest, index: int
) -> IntArray:
    """Spread a pool's quota, [N]; with scope ``global`` within each layer's floor and ceiling."""
    if config.scope == "layer":
        return run_policy(policy, request, pool.describe())
    totals = np.array([request.ranks[part].sum() for part in pool.slices()])
    capacities = np.array(pool.sizes) * config.mean_rank_ceiling - totals
    shares = [event_quota(config, single, index) for single in pool.split()]
    floors = np.floor(config.layer_floor * np.array(shares)).astype(np.int64)
    return allocate(policy, request, pool, np.minimum(floors, capacities), capacities)


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
    members: Layers,
    scores: Mapping[str, FloatArray],
    units: int,
    step: int,
    number: int,
) -> AllocationRequest:
    """Ask for ``units`` units, or for those that the budget has left."""
    ranks = np.concatenate([state.ranks for state in members.values()])
    signals = [layer.signals(state, config) for state in members.values()]
    scale = np.ones(pool.num_experts)
    if config.scope == "global":
        scale = layer_means(np.concatenate([scores[name] for name in members]), pool)
    return AllocationRequest(
        step=step,
        quota=min(units, pool.num_experts * config.r_target - int(ranks.sum())),
        ranks=ranks,
        limits=np.minimum(config.r_max - ranks, config.max_growth or config.r_max),
        routing=np.concatenate([routing for routing, _ in signals]),
        importance=np.concatenate([importance for _, importance in signals]),
        gamma=config.gamma,
        scale=scale,
        seed=(config.seed, step, number),
    )


def _prune(
    config: AllocatorConfig, members: Layers, index: int
) -> tuple[dict[str, LayerState], dict[str, NDArray[np.bool_]]]:
    """Cut the pool's least important dimensions, down to the cubic schedule's total."""
    states = list(members.values())
    ranks = np.concatenate([state.ranks for state in states])
    averages = np.concatenate([layer.dimension_importance(state, config) for state in states])
    excess = int(ranks.sum()) - config.scheduled_total(ranks.size, index)
    cut = pruning.least_important(averages, ranks, excess)
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
