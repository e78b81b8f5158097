"""Pools: the experts that share one quota, a layer (scope ``layer``) or all (scope ``global``).

Shapes: N experts of the pool, in the order of its layers; E experts of all pools, one after the
other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.policies import REQUEST_ARRAYS, AllocationRequest, Policy, run_policy


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

    def slices(self) -> list[slice]:
        """The range of each layer's experts, in the order of ``names``."""
        ends = itertools.accumulate(self.sizes)
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def split(self) -> list[Pool]:
        """A pool of each layer."""
        parts = zip(self.names, self.sizes, self.slices(), strict=True)
        return [Pool((name,), (n,), self.start + part.start) for name, n, part in parts]

    def describe(self) -> str:
        return f"layer {self.names[0]!r}" if len(self.names) == 1 else f"{len(self.names)} layers"


def make_pools(config: AllocatorConfig, sizes: Mapping[str, int]) -> list[Pool]:
    """Make a pool of each layer, or one of all layers (scope ``global``), from expert counts."""
    everything = Pool(tuple(sizes), tuple(sizes.values()))
    return [everything] if config.scope == "global" and sizes else everything.split()


def layer_means(values: FloatArray, sizes: Mapping[str, int]) -> FloatArray:
    """Each expert's layer mean, [E]; 1 for a layer whose values are all zero."""
    means, end = np.empty_like(values), 0
    for size in sizes.values():
        means[end : end + size] = values[end : end + size].mean() or 1.0
        end += size
    return means


def run_on_pools(
    policy: Policy,
    request: AllocationRequest,
    pools: Sequence[Pool],
    quotas: Sequence[int],
    seen: Sequence[bool],
) -> IntArray:
    """Run the policy on each pool that ``seen`` holds True for; the request is that of all, [E]."""
    growth = np.zeros_like(request.ranks)
    for number, pool in enumerate(pools):
        if seen[number]:
            arrays = {name: getattr(request, name)[pool.experts] for name in REQUEST_ARRAYS}
            own = dataclasses.replace(
                request, quota=quotas[number], seed=(*request.seed, number), **arrays
            )
            growth[pool.experts] = run_policy(policy, own, pool.describe())
    return growth


def allocate(
    policy: Policy, request: AllocationRequest, pool: Pool, floors: IntArray, capacities: IntArray
) -> IntArray:
    """Spread a global quota so that each layer gets at least its floor, at most its capacity.

    The policy runs on each layer for the floors, then on all experts. ``floors`` and ``capacities``
    are int64 [layers]; the floors sum to at most the quota. Returns the growth, int64 [N].
    """
    growth = np.zeros_like(request.ranks)
    for name, part, units in zip(pool.names, pool.slices(), floors, strict=True):
        layer = _restrict(request, part, min(int(units), request.quota - int(growth.sum())))
        growth += run_policy(policy, layer, f"layer {name!r}")
    rest = dataclasses.replace(
        request,
        quota=request.quota - int(growth.sum()),
        ranks=request.ranks + growth,
        limits=request.limits - growth,
    )
    used = np.array([growth[part].sum() for part in pool.slices()])
    return growth + _allocate_under_capacities(policy, rest, pool, capacities - used)


def _allocate_under_capacities(
    policy: Policy, request: AllocationRequest, pool: Pool, capacities: IntArray
) -> IntArray:
    """Run the policy on all experts; cap layers that exceed their capacity, share out the rest."""
    filled = np.zeros_like(request.ranks)
    while True:
        growth = run_policy(policy, request, pool.describe())
        used = np.array([growth[part].sum() for part in pool.slices()])
        if (used <= capacities).all():
            return filled + growth
        limits, quota = request.limits.copy(), request.quota
        for index in np.flatnonzero(used > capacities):
            part = pool.slices()[index]
            full = _restrict(request, part, int(capacities[index]))
            growth = run_policy(policy, full, f"layer {pool.names[index]!r}")
            filled += growth
            quota -= int(growth.sum())
            limits[part] = 0
        request = dataclasses.replace(request, limits=limits, quota=quota)


def _restrict(request: AllocationRequest, part: slice, quota: int) -> AllocationRequest:
    """Limit a request to the experts of one layer."""
    limits = np.zeros_like(request.limits)
    limits[part] = request.limits[part]
    return dataclasses.replace(request, quota=quota, limits=limits)
