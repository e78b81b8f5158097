"""Checks of a layer that is added to an engine. Shape letters: N experts."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from drlora_core.bounds import MOST_EXPERTS
from drlora_core.config import AllocatorConfig
from drlora_core.ema import IntArray
from drlora_core.errors import LayoutError, shorten
from drlora_core.state import check_dimensions

logger = logging.getLogger(__name__)


def check_layer(
    config: AllocatorConfig, name: object, num_experts: int, others: Mapping[str, IntArray]
) -> None:
    """Refuse a name that is taken or not a str, and too few or too many experts.

    Args:
        config: the engine's.
        name: the layer.
        num_experts: N.
        others: starting ranks of the layers before it.
    """
    if not isinstance(name, str):
        raise LayoutError(f"a layer name must be a str, got {name!r}")
    if name in others:
        raise LayoutError(f"layer {name!r} was already added; names must be unique")
    whole = isinstance(num_experts, (int, np.integer)) and not isinstance(num_experts, bool)
    if not whole or num_experts < 1:
        raise LayoutError(f"num_experts must be a whole number above 0, got {num_experts!r}")
    if num_experts > MOST_EXPERTS:
        raise LayoutError(
            f"num_experts must be at most {MOST_EXPERTS:,}, got {shorten(num_experts)}: an engine "
            "keeps numbers of every expert"
        )
    if config.cuts:
        check_dimensions(config, int(num_experts) + sum(ranks.size for ranks in others.values()))


def check_ranks(config: AllocatorConfig, default: IntArray, ranks: ArrayLike) -> IntArray:
    """Check starting ranks that were given, [N]; return them as int64."""
    given = np.asarray(ranks)
    least, budget = config.least_rank, default.size * config.r_target
    if given.shape != default.shape or not np.issubdtype(given.dtype, np.integer):
        raise LayoutError(
            f"ranks must be integers of shape {default.shape}, got {given.dtype}{given.shape}"
        )
    if config.policy == "prune" and (given != config.r_init).any():
        raise LayoutError(f"policy 'prune' starts every expert at r_init = {config.r_init}")
    if given.min() < least or given.max() > config.r_max:
        found = f"{given.min()}..{given.max()}"
        raise LayoutError(f"starting ranks lie in {found}, not {least}..{config.r_max}")
    if config.policy != "prune" and given.sum() > budget:
        raise LayoutError(f"starting ranks sum to {given.sum()}, above the budget of {budget}")
    return given.astype(np.int64)


def report_shortfall(config: AllocatorConfig, name: str, ranks: IntArray) -> None:
    """Warn of a fixed quota that will not spend the budget of a layer with starting ranks [N]."""
    if config.quota is None or config.policy == "uniform":
        return
    quota = min(config.quota, ranks.size * (config.max_growth or config.r_max))
    planned, start = quota * config.num_events, int(ranks.sum())
    budget = ranks.size * config.r_target
    if start + planned < budget:
        logger.warning(
            f"layer {name!r}: quota {quota} x {config.num_events} events = {planned} < "
            f"{budget - start} needed; total rank will end at {start + planned} of {budget}"
        )
