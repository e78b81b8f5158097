"""One event, which grows ranks or cuts them: from the state to a decision, as pure functions.

Shapes: L layers, E experts of all layers, one layer after the other.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drlora_core import moving, notebook, pruning, timetable
from drlora_core import state as states
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.policies import AllocationRequest, Policy
from drlora_core.pools import (
    Pool,
    allocate,
    layer_means,
    make_pools,
    pool_sums,
    request_of,
    run_on_pools,
)
from drlora_core.saliency import saliency
from drlora_core.state import Place, State

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GrowthEvent:
    """The decision of one event; all mappings are by layer name, arrays are [N]."""

    step: int
    """Optimizer step after which it happened, counted from 1."""
    index: int
    """k, the number of the event, counted from 1."""
    deltas: Mapping[str, IntArray]
    """Change of each expert's rank, int64; negative where dimensions were cut."""
    ranks: Mapping[str, IntArray]
    """Ranks after the event, int64."""
    saliency: Mapping[str, FloatArray]
    """S before the event, by which experts were ordered, float64."""
    unplaced: int
    """Rank units that limits left over, carried to the next event (all layers)."""
    cut: Mapping[str, NDArray[np.bool_]]
    """The dimensions cut, bool [N, r_max], numbered as before the event; empty unless
    ``config.cuts``. An expert gains ``deltas`` plus its cuts; none has both gains and cuts."""

    def __repr__(self) -> str:
        layers, growth = notebook.count(len(self.ranks), "layer"), notebook.total_rank(self.deltas)
        total, cuts = notebook.total_rank(self.ranks), notebook.total_rank(self.cut)
        change = f"{growth:+d} ranks" + (f", {cuts} moved" if cuts and growth > -cuts else "")
        return f"GrowthEvent(step={self.step}, {layers}, {change}, total {total})"

    def _repr_html_(self) -> str:
        return notebook.layers_table(f"{self!r}, ranks after it", self.ranks)


def decide(
    config: AllocatorConfig,
    policy: Policy | None,
    state: State,
    carry: tuple[int, ...],
    step: int,
) -> tuple[GrowthEvent | None, State, tuple[int, ...]]:
    """Decide the event after optimizer step ``step`` (from 1), if there is one.

    The policy is None if ``config.cuts``; ``carry`` holds the units that each pool carried over.
    Returns the event or None, the new state, and the units that each pool carries over. A pool of
    which no sample has been seen waits: its units are carried over, nothing is cut.
    """
    index = timetable.event_index(
        step, config.warmup_steps, config.growth_interval, config.growth_end
    )
    if index is None:
        return None, state, carry
    pools = make_pools(config, state.sizes)
    seen = _have_samples(state, pools, step)
    signals = states.signals(state, config)
    scores = saliency(*signals, state.ranks, config.gamma)
    cut: NDArray[np.bool_] | None = None
    if policy is None and config.policy == "prune":
        cut = _choose_cuts(config, state, pools, seen, index)
        after, left_over = states.cut(state, cut), (0,) * len(pools)
    else:
        quotas = _quotas(config, state, pools, carry, index)
        request = _make_request(config, state, signals, scores, step)
        if policy is None:
            growth, cut = _move(config, state, pools, request, quotas, seen, index)
            after = states.grow(states.cut(state, cut), growth)
        else:
            growth = _spread(config, policy, pools, request, quotas, seen, index)
            after = states.grow(state, growth)
        left_over = tuple((quotas - pool_sums(after.ranks - state.ranks, pools)).tolist())
    event = GrowthEvent(
        step=step,
        index=index,
        deltas=_by_layer(after.ranks - state.ranks, state.places),
        ranks=_by_layer(after.ranks.copy(), state.places),
        saliency=_by_layer(scores, state.places),
        unplaced=sum(left_over),
        cut={} if cut is None else _by_layer(cut, state.places),
    )
    return event, after, left_over


def _by_layer(values: NDArray[Any], places: Mapping[str, Place]) -> dict[str, NDArray[Any]]:
    """Split an array over all experts, [E], into those of the layers."""
    return {name: values[experts] for name, (_, experts) in places.items()}


def _have_samples(state: State, pools: Sequence[Pool], step: int) -> NDArray[np.bool_]:
    """True for each pool of which a sample was seen; the event of others waits, and says so."""
    seen = pool_sums(states.count_updates(state), pools) > 0
    for number in np.flatnonzero(~seen).tolist():
        logger.warning(
            "the event after step %d leaves the ranks of %s as they are: no sample of routing or "
            "importance has been seen",
            step,
            pools[number].describe(),
        )
    return seen


def _quotas(
    config: AllocatorConfig,
    state: State,
    pools: Sequence[Pool],
    carry: tuple[int, ...],
    index: int,
) -> IntArray:
    """Units that each pool may place: quota and carried units, or what the budget has left."""
    due = [event_quota(config, pool, index) for pool in pools]
    budgets = np.array([pool.num_experts * config.r_target for pool in pools])
    return np.minimum(np.add(due, carry), budgets - pool_sums(state.ranks, pools))


def _spread(
    config: AllocatorConfig,
    policy: Policy,
    pools: Sequence[Pool],
    request: AllocationRequest,
    quotas: IntArray,
    seen: NDArray[np.bool_],
    index: int,
) -> IntArray:
    """Spread the quotas, [E]; with scope ``global`` within each layer's floor and ceiling."""
    if config.scope == "layer":
        return run_on_pools(policy, request, pools, quotas, seen)
    if not seen[0]:
        return np.zeros_like(request.ranks)
    (pool,) = pools
    layers = pool.split()
    capacities = np.array(pool.sizes) * config.mean_rank_ceiling - pool_sums(request.ranks, layers)
    shares = [event_quota(config, layer, index) for layer in layers]
    floors = np.floor(config.layer_floor * np.array(shares)).astype(np.int64)
    request = dataclasses.replace(request, quota=int(quotas[0]), seed=(*request.seed, 0))
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
    state: State,
    signals: tuple[FloatArray, FloatArray],
    scores: FloatArray,
    step: int,
) -> AllocationRequest:
    """Describe the experts of all layers; a pool adds its quota and its number, to the seed."""
    scale = np.ones(scores.size)
    if config.scope == "global":
        (pool,) = make_pools(config, state.sizes)
        scale = layer_means(scores, pool.split())
    return AllocationRequest(
        step=step,
        quota=0,
        ranks=state.ranks.copy(),
        limits=np.minimum(config.r_max - state.ranks, config.max_growth or config.r_max),
        routing=signals[0],
        importance=signals[1],
        gamma=config.gamma,
        scale=scale,
        seed=(config.seed, step),
    )


def _choose_cuts(
    config: AllocatorConfig,
    state: State,
    pools: Sequence[Pool],
    seen: NDArray[np.bool_],
    index: int,
) -> NDArray[np.bool_]:
    """Choose each pool's least important dimensions, down to the cubic schedule's total, [E, R]."""
    averages = states.dimension_importance(state, config)
    cut = np.zeros(averages.shape, dtype=np.bool_)
    for pool, due in zip(pools, seen, strict=True):
        ranks = state.ranks[pool.experts]
        excess = int(ranks.sum()) - config.scheduled_total(ranks.size, index if due else 0)
        cut[pool.experts] = pruning.least_important(
            averages[pool.experts], ranks, excess, config.r_min
        )
    return cut


def _move(
    config: AllocatorConfig,
    state: State,
    pools: Sequence[Pool],
    request: AllocationRequest,
    quotas: IntArray,
    seen: NDArray[np.bool_],
    index: int,
) -> moving.Exchange:
    """Choose what the experts of each pool receive and give, [E] and [E, R]."""
    averages = states.dimension_importance(state, config)
    growth, cut = np.zeros_like(state.ranks), np.zeros(averages.shape, dtype=np.bool_)
    # g restarts with growth, so its count tells which experts grew at the last event.
    may_give = state.importance_count > (config.growth_interval if index > 1 else 0)
    for number in np.flatnonzero(seen).tolist():
        pool = pools[number]
        part, total = pool.experts, int(state.ranks[pool.experts].sum())
        growth[part], cut[part] = moving.exchange(
            request_of(request, pool, number, quotas),
            averages[part],
            may_give[part],
            config.r_min,
            timetable.moved_units(index, config.num_events, config.move_share, total),
        )
    return moving.Exchange(growth, cut)
