"""What the grouped kernel does with sorted rows, in operations of torch: the reference.

Rows of sentinels, behind those of the last expert, may hold anything; what reads them is said to
skip them.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
F features, P rank slots, R rank dimensions of an expert at most.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels.factors import Owned


def gather(inputs: Tensor, dispatch: Dispatch) -> Tensor:
    """The row of each pair's token, [T, F] -> [S, F]; those of sentinels may hold anything."""
    return inputs.index_select(0, dispatch.tokens)


def low_rows(
    inputs: Tensor,
    tokens: Tensor | None,
    factor: Tensor,
    owned: Owned,
    dispatch: Dispatch,
    scaling: float,
) -> Tensor:
    """Scaled products of each row with its expert's rows of a factor [P, F]: [S, R].

    ``inputs`` are sorted rows [S, F], or with ``tokens`` [S] those of the tokens, [T, F].
    """
    rows = inputs if tokens is None else inputs.index_select(0, tokens)
    padded = _padded(factor, owned).to(rows.dtype)
    return scaling * grouped_mm(rows, padded.transpose(1, 2), offs=dispatch.offsets)


def add_rows_(
    output: Tensor, low: Tensor, factor: Tensor, owned: Owned, dispatch: Dispatch
) -> None:
    """Add the product of ``low`` [S, R] with the expert's rows of a factor to rows [S, F]."""
    output += grouped_mm(low, _padded(factor, owned).to(low.dtype), offs=dispatch.offsets)


def factor_gradient(
    low: Tensor,
    inputs: Tensor,
    tokens: Tensor | None,
    factor: Tensor,
    owned: Owned,
    dispatch: Dispatch,
) -> Tensor:
    """low^T inputs of each expert, in the rows of a factor that are its own: [P, F].

    Rows without an owner get 0. ``inputs`` and ``tokens`` as for :func:`low_rows`.
    """
    rows = inputs if tokens is None else inputs.index_select(0, tokens)
    products = grouped_mm(low.T, rows, offs=dispatch.offsets)  # [N, R, F]
    count, features = factor.shape
    found = torch.zeros(count + 1, features, dtype=factor.dtype, device=factor.device)
    places = torch.where(owned.table < 0, count, owned.table)
    found.index_copy_(0, places.view(-1), products.view(-1, features).to(found.dtype))
    return found[:count]


def sum_pairs(rows: Tensor, weights: Tensor | None, dispatch: Dispatch) -> Tensor:
    """Sum each token's rows, times their weights [T, K] if given: [S, F] -> [T, F].

    In the dtype that rows and weights promote to; skips rows of sentinels.
    """
    places = dispatch.rows
    by_token = rows[places]  # [T, K, F]
    if weights is not None:
        by_token = by_token * weights.unsqueeze(-1)
    return by_token.masked_fill((places >= dispatch.offsets[-1]).unsqueeze(-1), 0.0).sum(dim=1)


def weigh_(
    gradient: Tensor, inputs: Tensor, tokens: Tensor | None, weights: Tensor, dispatch: Dispatch
) -> Tensor:
    """Multiply each row of a gradient [S, F] by its weight, in place.

    Returns:
        Its product with the row of ``inputs`` before that, [S], in the dtype of the weights [S];
        0 for sentinels.
    """
    rows = inputs if tokens is None else inputs.index_select(0, tokens)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    products = (gradient.to(wide) * rows).sum(dim=1).to(weights.dtype)
    gradient *= weights.unsqueeze(-1)
    return products.masked_fill(~dispatch.live, 0.0)


def clear_sentinels_(rows: Tensor, dispatch: Dispatch) -> None:
    """Zero the rows of sentinels."""
    rows.masked_fill_(~dispatch.live.unsqueeze(-1), 0.0)


def _padded(factor: Tensor, owned: Owned) -> Tensor:
    """Rows of each expert, [N, R, F]; zeros behind its last."""
    return factor[owned.table.clamp(min=0)] * (owned.table >= 0).unsqueeze(-1)
