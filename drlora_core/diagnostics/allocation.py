"""Checks of how rank was spread over experts, events and layers."""

from __future__ import annotations

import numpy as np

from drlora_core.comparison import total_variation
from drlora_core.diagnostics.finding import Finding, NotCheckedError, Thresholds
from drlora_core.diagnostics.subject import Subject
from drlora_core.events import quota_of
from drlora_core.pools import Pool


def saturated_growth(subject: Subject, limits: Thresholds) -> Finding | None:
    """Few experts take all the growth and are full."""
    _need_growth(subject, limits)
    config = subject.config
    growth = np.concatenate([subject.growth(name) for name in subject.layers])
    ranks = np.concatenate([subject.ranks[name] for name in subject.layers])
    served = float((growth > 0).mean())
    fewest = float(growth.mean()) / (config.r_max - config.r_init)
    full_share = float(growth[ranks == config.r_max].sum() / growth.sum())
    few = served <= min(limits.few_experts, limits.few_factor * fewest)
    if not few or full_share < limits.full_share:
        return None
    by_walk = config.policy == "greedy" and config.max_growth is None
    return Finding(
        "saturated_growth",
        "note" if by_walk else "warning",
        f"{served:.0%} of the experts got all the growth; {full_share:.0%} of it lies with "
        f"experts at r_max {config.r_max}",
        {
            "experts_served": served,
            "fewest_possible": fewest,
            "share_of_full_experts": full_share,
            "gamma": config.gamma,
        },
        "the greedy walk fills an expert up in one event: set max_growth, or policy 'rescored'"
        if by_walk
        else f"a larger gamma than {config.gamma:g}, a smaller max_growth or a smaller r_max",
    )


def even_growth(subject: Subject, limits: Thresholds) -> Finding | None:
    """Growth cannot be told from uniform LoRA."""
    _need_growth(subject, limits)
    distances = {
        name: total_variation(ranks, np.ones_like(ranks)) for name, ranks in subject.ranks.items()
    }
    middle = float(np.median(list(distances.values())))
    if middle > limits.even_distance:
        return None
    return Finding(
        "even_growth",
        "warning",
        f"the ranks are those of uniform LoRA but for {middle:.1%} of the units (median of the "
        f"layers)",
        {"distance_from_even": distances, "gamma": subject.config.gamma},
        f"a smaller gamma than {subject.config.gamma:g}, fewer events, or uniform LoRA, which "
        f"does the same for less",
    )


def stagnant_growth(subject: Subject, limits: Thresholds) -> Finding | None:
    """The last events placed nothing although quota was due and budget is left."""
    config = subject.config
    if subject.events is None:
        raise NotCheckedError("a live engine keeps no past events; diagnose its recording")
    if config.policy in ("uniform", "prune"):
        raise NotCheckedError(f"policy {config.policy!r} does not grow")
    last = subject.events[-limits.stagnant_events :]
    if len(last) < limits.stagnant_events:
        return None
    pools = [Pool((name,), (size,)) for name, size in subject.layers.items()]
    if config.scope == "global":
        pools = [Pool(tuple(subject.layers), tuple(subject.layers.values()))]
    stuck = {}
    for pool in pools:
        placed = sum(int(event.deltas[name].sum()) for event in last for name in pool.names)
        total = sum(int(subject.ranks[name].sum()) for name in pool.names)
        left = pool.num_experts * config.r_target - total
        due = sum(quota_of(config, pool, event.index) for event in last)
        if placed == 0 and left > 0 and due > 0:
            stuck[pool.names[0] if len(pool.names) == 1 else "all layers"] = left
    if not stuck:
        return None
    return Finding(
        "stagnant_growth",
        "warning",
        f"the last {len(last)} events placed nothing in {len(stuck)} of {len(pools)} pools, with "
        f"{sum(stuck.values())} units of their budgets left",
        {"units_left": stuck, "events": [event.step for event in last]},
        "look at the policy and at r_max and max_growth; without growth to come, end it earlier",
    )


def unplaced_quota(subject: Subject, limits: Thresholds) -> Finding | None:
    """Limits left quota unplaced."""
    if subject.unplaced == 0:
        return None
    ranks = np.concatenate(list(subject.ranks.values()))
    full = float((ranks == subject.config.r_max).mean())
    return Finding(
        "unplaced_quota",
        "warning",
        f"limits left {subject.unplaced} units unplaced so far; {full:.0%} of the experts are at "
        f"r_max",
        {"units": subject.unplaced, "experts_at_r_max": full},
        f"a larger max_growth than {subject.config.max_growth}, a larger r_max than "
        f"{subject.config.r_max}, or more events",
    )


def monopolised_budget(subject: Subject, limits: Thresholds) -> Finding | None:
    """A layer takes far more than its even share of a global budget."""
    if subject.config.scope != "global":
        raise NotCheckedError("scope 'layer' gives every layer the same")
    _need_growth(subject, limits)
    units = {name: float(subject.growth(name).sum()) for name in subject.layers}
    total, experts = sum(units.values()), sum(subject.layers.values())
    ratios = {name: units[name] / (total * n / experts) for name, n in subject.layers.items()}
    above = {name: ratio for name, ratio in ratios.items() if ratio >= limits.monopoly_ratio}
    if not above:
        return None
    first = max(above, key=lambda name: above[name])
    return Finding(
        "monopolised_budget",
        "warning",
        f"layer {first!r} grew by {above[first]:.1f} times its even share; {len(above)} of "
        f"{len(units)} layers by {limits.monopoly_ratio:g} times or more",
        {"growth_over_even_share": ratios},
        f"a larger layer_floor than {subject.config.layer_floor:g}, a smaller layer_ceiling than "
        f"{subject.config.mean_rank_ceiling}, or scope 'layer'",
    )


def _need_growth(subject: Subject, limits: Thresholds) -> None:
    if subject.config.policy in ("uniform", "prune"):
        raise NotCheckedError(f"policy {subject.config.policy!r} does not grow")
    if subject.config.r_target == subject.config.r_init:
        raise NotCheckedError("r_init = r_target: nothing grows")
    if (progress := subject.progress()) < limits.progress:
        raise NotCheckedError(
            f"{progress:.0%} of the growth is placed; judged from {limits.progress:.0%} on"
        )
