"""Which rows belong to which expert: the (token, expert) pairs of one forward, sorted by expert.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
F features.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclasses.dataclass(frozen=True, eq=False)
class Dispatch:
    """The pairs of one forward, sorted by expert.

    Pairs whose index is not an expert (the sentinel ``num_experts`` of expert parallelism) come
    last and belong to nobody.
    """

    order: Tensor  # int64 [S], pair at each sorted row
    tokens: Tensor  # int64 [S], token at each sorted row
    experts: Tensor  # int64 [S], expert at each sorted row; N - 1 for sentinels
    offsets: Tensor  # int32 [N], where expert e's rows stop and those of e + 1 begin
    top_k: int
    sentinels: bool = True
    """False where only a sum over pairs reads sentinels' rows, so that they may hold anything."""

    @classmethod
    def sort(cls, top_k_index: Tensor, num_experts: int, *, sentinels: bool = True) -> Dispatch:
        """Sort the pairs of ``top_k_index`` (int64 [T, K]); stable, so results are repeatable."""
        pairs = top_k_index.reshape(-1)
        few = pairs.is_cuda and num_experts < torch.iinfo(torch.int16).max
        # a GPU sorts byte by byte
        keys = pairs.clamp(max=num_experts).short() if few else pairs
        experts, order = torch.sort(keys, stable=True)
        experts = experts.to(pairs.dtype)
        wanted = torch.arange(num_experts, device=pairs.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, wanted, right=True, out_int32=True)
        top_k = top_k_index.shape[-1]
        experts = experts.clamp(max=num_experts - 1)
        return cls(order, order // top_k, experts, offsets, top_k, sentinels)

    @functools.cached_property
    def live(self) -> Tensor:
        """Rows that belong to an expert, bool [S]."""
        return torch.arange(self.num_pairs, device=self.order.device) < self.offsets[-1]

    @functools.cached_property
    def rows(self) -> Tensor:
        """Sorted row of each pair, int64 [T, K]."""
        rows = torch.empty_like(self.order)
        rows[self.order] = torch.arange(self.num_pairs, device=rows.device)
        return rows.view(-1, self.top_k)

    @functools.cached_property
    def counts(self) -> list[int]:
        """Rows of each expert, and last the sentinels'; waits for the device once."""
        ends = [0, *self.offsets.tolist(), self.num_pairs]
        return [end - start for start, end in itertools.pairwise(ends)]

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of the rows of each expert, [S, ...] -> N of [n, ...]; last the sentinels'."""
        views: tuple[Tensor, ...] = rows.split_with_sizes(self.counts)
        return views

    @property
    def num_pairs(self) -> int:
        return self.order.shape[0]

    def empty(self, like: Tensor, features: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a row per pair, [S, F]; zeros where sentinel rows would stay unwritten."""
        new = like.new_zeros if self.counts[-1] else like.new_empty
        room: Tensor = new((self.num_pairs, features), dtype=dtype)
        return room

    def live_weights(self, weights: Tensor) -> Tensor:
        """Routing weights [T, K] with 0 for sentinels, whose own may be anything."""
        if not self.counts[-1]:
            return weights
        return weights.masked_fill(self.rows >= self.num_pairs - self.counts[-1], 0.0)

    def sum(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum each token's sorted rows, times their weights [T, K] if given, [S, F] -> [T, F].

        One pass that reads each row once; for use inside of an autograd function.
        """
        if not self.num_pairs:
            return rows.new_zeros(self.rows.shape[0], rows.shape[1])
        return embedding_bag(self.rows, rows, mode="sum", per_sample_weights=weights)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """What :meth:`sum` does with weights, differentiable in both."""
        weighted = rows * weights.reshape(-1)[self.order].unsqueeze(-1)
        # sentinel rows must reach neither the output nor the router
        weighted = weighted.masked_fill(~self.live.unsqueeze(-1), 0.0)
        by_pair = weighted.new_empty(weighted.shape).index_copy(0, self.order, weighted)
        return by_pair.view(-1, self.top_k, rows.shape[1]).sum(dim=1)
