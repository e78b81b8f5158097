"""Pools: the experts that share one quota, a layer (scope ``layer``) or all (scope ``global``).

Shapes: N experts of the pool, in the order of its layers; E experts of all pools, one after the
other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.policies import (
    REQUEST_ARRAYS,
    AllocationRequest,
    Policy,
    run_policy,
    stack_requests,
    takes_stacks,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Pool:
    """Layers that share a quota; the arrays of a pool hold the experts of its layers in order."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    start: int = 0  # the first of its experts among all, [E]

    @property
    def num_experts(self) -> int:
        return sum(self.sizes)

    @property
    def experts(self) -> slice:
        """Its experts among all, [E]."""
        return slice(self.start, self.start + self.num_experts)

    def split(self) -> list[Pool]:
        """A pool of each layer."""
        starts = itertools.accumulate(self.sizes, initial=self.start)  # and the end of the last
        parts = zip(self.names, self.sizes, starts, strict=False)
        return [Pool((name,), (n,), start) for name, n, start in parts]

    def describe(self) -> str:
        return f"layer {self.names[0]!r}" if len(self.names) == 1 else f"{len(self.names)} layers"


def make_pools(config: AllocatorConfig, sizes: Mapping[str, int]) -> list[Pool]:
    """Make a pool of each layer, or one of all layers (scope ``global``), from expert counts."""
    everything = Pool(tuple(sizes), tuple(sizes.values()))
    return [everything] if config.scope == "global" and sizes else everything.split()


def stacks(pools: Sequence[Pool]) -> Iterator[tuple[slice, slice]]:
    """Join neighbors with as many experts each: a range of the pools, and one of their experts."""
    first = 0
    for size, members in itertools.groupby(pools, key=lambda pool: pool.num_experts):
        end, start = first + len(list(members)), pools[first].start
        yield slice(first, end), slice(start, start + (end - first) * size)
        first = end


def pool_sums(values: IntArray, pools: Sequence[Pool]) -> IntArray:
    """Sum of each pool's values, [pools]; the pools hold all experts, [E]."""
    return np.add.reduceat(values, [pool.start for pool in pools])


def layer_means(values: FloatArray, layers: Sequence[Pool]) -> FloatArray:
    """Each expert's layer mean, [E]; 1 for a layer whose values are all zero."""
    means = np.empty_like(values)
    for members, experts in stacks(layers):
        stack = means[experts].reshape(members.stop - members.start, -1)
        stack[:] = values[experts].reshape(stack.shape).mean(axis=1, keepdims=True)
        stack[stack == 0.0] = 1.0
    return means


def run_on_pools(
    policy: Policy,
    request: AllocationRequest,
    pools: Sequence[Pool],
    quotas: IntArray,
    seen: NDArray[np.bool_],
) -> IntArray:
    """Run the policy on each pool that ``seen`` holds True for; the request is that of all, [E]."""
    if takes_stacks(policy):
        return _run_on_stacks(policy, request, pools, np.where(seen, quotas, 0))
    growth = np.zeros_like(request.ranks)
    for number in np.flatnonzero(seen).tolist():
        pool = pools[number]
        own = request_of(request, pool, number, quotas)
        growth[pool.experts] = run_policy(policy, own, pool.describe())
    return growth


def request_of(
    request: AllocationRequest, pool: Pool, number: int, quotas: IntArray
) -> AllocationRequest:
    """Make the request of one pool, by its number, from that of all."""
    arrays = {name: getattr(request, name)[pool.experts] for name in REQUEST_ARRAYS}
    seed = (*request.seed, number)
    return dataclasses.replace(request, quota=int(quotas[number]), seed=seed, **arrays)


def _run_on_stacks(
    policy: Policy, request: AllocationRequest, pools: Sequence[Pool], quotas: IntArray
) -> IntArray:
    """Run a policy that takes stacks on each pool, many pools at once."""
    growth = np.empty_like(request.ranks)
    for members, experts in stacks(pools):
        stack = stack_requests(request, quotas[members], experts)
        growth[experts] = run_policy(policy, stack, f"{len(pools)} pools").reshape(-1)
    return growth


def allocate(
    policy: Policy, request: AllocationRequest, pool: Pool, floors: IntArray, capacities: IntArray
) -> IntArray:
    """Spread a global quota so that each layer gets at least its floor, at most its capacity.

    The policy runs on each layer for the floors, then on all experts. ``floors`` and ``capacities``
    are int64 [layers]; if the floors sum to more than the quota, the last layers get less. Returns
    the growth, int64 [N].
    """
    layers = pool.split()
    growth = _run_on_layers(policy, request, layers, floors)
    rest = dataclasses.replace(
        request,
        quota=request.quota - int(growth.sum()),
        ranks=request.ranks + growth,
        limits=request.limits - growth,
    )
    left = capacities - pool_sums(growth, layers)
    return growth + _allocate_under_capacities(policy, rest, pool, left)


def _run_on_layers(
    policy: Policy, request: AllocationRequest, layers: Sequence[Pool], quotas: IntArray
) -> IntArray:
    """Run the policy on the experts of each layer, as far as the quota of the request lasts."""
    if takes_stacks(policy) and quotas.sum() <= request.quota:
        return _run_on_stacks(policy, request, layers, quotas)
    growth = np.zeros_like(request.ranks)
    for layer, units in zip(layers, quotas.tolist(), strict=True):
        own = _restrict(request, layer.experts, min(units, request.quota - int(growth.sum())))
        growth += run_policy(policy, own, layer.describe())
    return growth


def _allocate_under_capacities(
    policy: Policy, request: AllocationRequest, pool: Pool, capacities: IntArray
) -> IntArray:
    """Run the policy on all experts; cap layers that exceed their capacity, share out the rest."""
    filled = np.zeros_like(request.ranks)
    layers = pool.split()
    while True:
        growth = run_policy(policy, request, pool.describe())
        exceeded = pool_sums(growth, layers) > capacities
        if not exceeded.any():
            return filled + growth
        limits, quota = request.limits.copy(), request.quota
        for index in np.flatnonzero(exceeded):
            part = layers[index].experts
            full = _restrict(request, part, int(capacities[index]))
            growth = run_policy(policy, full, layers[index].describe())
            filled += growth
            quota -= int(growth.sum())
            limits[part] = 0
        request = dataclasses.replace(request, limits=limits, quota=quota)


def _restrict(request: AllocationRequest, part: slice, quota: int) -> AllocationRequest:
    """Limit a request to the experts of one layer."""
    limits = np.zeros_like(request.limits)
    limits[part] = request.limits[part]
    return dataclasses.replace(request, quota=quota, limits=limits)
