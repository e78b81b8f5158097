"""Which rows belong to which expert: the (token, expert) pairs of one forward, sorted by expert.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
F features.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


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

    @classmethod
    def sort(cls, top_k_index: Tensor, num_experts: int) -> Dispatch:
        """Sort the pairs of ``top_k_index`` (int64 [T, K]); stable, so results are repeatable."""
        pairs = top_k_index.reshape(-1)
        experts, order = torch.sort(pairs, stable=True)
        wanted = torch.arange(num_experts, device=pairs.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, wanted, right=True, out_int32=True)
        top_k = top_k_index.shape[-1]
        return cls(order, order // top_k, experts.clamp(max=num_experts - 1), offsets, top_k)

    @functools.cached_property
    def ends(self) -> list[int]:
        """The offsets as numbers; waits for the device once."""
        return self.offsets.tolist()

    @functools.cached_property
    def live(self) -> Tensor:
        """Rows that belong to an expert, bool [S]."""
        return torch.arange(self.num_pairs, device=self.order.device) < self.offsets[-1]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, and which."""
        for expert, (start, end) in enumerate(itertools.pairwise([0, *self.ends])):
            if start < end:
                yield expert, slice(start, end)

    @property
    def num_pairs(self) -> int:
        """S."""
        return self.order.shape[0]

    def empty(self, like: Tensor, features: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a row per pair, [S, F]; zeros where sentinel rows would stay unwritten."""
        shape = (self.num_pairs, features)
        full = not self.num_pairs or self.ends[-1] == self.num_pairs
        return like.new_empty(shape, dtype=dtype) if full else like.new_zeros(shape, dtype=dtype)

    def sum_of_pairs(self, by_pair: Tensor) -> Tensor:
        """Sum the pairs of each token, [S, F] in the order of pairs -> [T, F]."""
        tokens = self.num_pairs // self.top_k
        return by_pair.view(tokens, self.top_k, by_pair.shape[1]).sum(dim=1)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sum each token's sorted rows times their routing weights, [S, F], [T, K] -> [T, F]."""
        weighted = rows * weights.reshape(-1)[self.order].unsqueeze(-1)
        # sentinel rows must reach neither the output nor the router
        weighted = weighted.masked_fill(~self.live.unsqueeze(-1), 0.0)
        by_pair = weighted.new_empty(weighted.shape).index_copy(0, self.order, weighted)
        return self.sum_of_pairs(by_pair)
