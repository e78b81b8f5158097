"""Checks of how rank was spread over experts, events and layers."""

from __future__ import annotations

import numpy as np

from drlora_core.comparison import total_variation
from drlora_core.diagnostics.subject import Finding, NotCheckedError, Subject, Thresholds
from drlora_core.events import event_quota
from drlora_core.pools import make_pools


def saturated_growth(subject: Subject, limits: Thresholds) -> Finding | None:
    """A few experts took all the growth and reached r_max."""
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
        f"{served:.0%} of the experts got all the growth; {full_share:.0%} of it went to "
        f"experts at r_max {config.r_max}",
        "the greedy walk fills an expert up in one event: set max_growth, or policy 'rescored'"
        if by_walk
        else f"a larger gamma than {config.gamma:g}, a smaller max_growth or a smaller r_max",
        {
            "experts_served": served,
            "fewest_possible": fewest,
            "share_of_full_experts": full_share,
            "gamma": config.gamma,
        },
        "note" if by_walk else "warning",
    )


def even_growth(subject: Subject, limits: Thresholds) -> Finding | None:
    """The ranks are almost those of uniform LoRA."""
    _need_growth(subject, limits)
    distances = {
        name: total_variation(ranks, np.ones_like(ranks)) for name, ranks in subject.ranks.items()
    }
    median = float(np.median(list(distances.values())))
    if median > limits.even_distance:
        return None
    gamma = subject.config.gamma
    return Finding(
        f"the ranks differ from uniform LoRA by only {median:.1%} of the units (median of the "
        f"layers)",
        f"a smaller gamma than {gamma:g}, fewer events, or uniform LoRA, which costs less",
        {"distance_from_even": distances, "gamma": gamma},
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
    pools = make_pools(config, subject.layers)
    stuck = {}
    for pool in pools:
        placed = sum(int(event.deltas[name].sum()) for event in last for name in pool.names)
        total = sum(int(subject.ranks[name].sum()) for name in pool.names)
        left = pool.num_experts * config.r_target - total
        due = sum(event_quota(config, pool, event.index) for event in last)
        if placed == 0 and left > 0 and due > 0:
            stuck[pool.names[0] if len(pool.names) == 1 else "all layers"] = left
    if not stuck:
        return None
    return Finding(
        f"the last {len(last)} events placed nothing in {len(stuck)} of {len(pools)} pools, "
        f"with {sum(stuck.values())} units of their budgets left",
        "check the policy, r_max and max_growth; if nothing more can grow, set an earlier "
        "growth_end",
        {"units_left": stuck, "events": [event.step for event in last]},
    )


def unplaced_quota(subject: Subject, limits: Thresholds) -> Finding | None:
    """Limits left quota unplaced."""
    if subject.unplaced == 0:
        return None
    ranks = np.concatenate(list(subject.ranks.values()))
    full = float((ranks == subject.config.r_max).mean())
    return Finding(
        f"limits left {subject.unplaced} units unplaced so far; {full:.0%} of the experts are at "
        f"r_max",
        f"a larger max_growth than {subject.config.max_growth}, a larger r_max than "
        f"{subject.config.r_max}, or more events",
        {"units": subject.unplaced, "experts_at_r_max": full},
    )


def monopolised_budget(subject: Subject, limits: Thresholds) -> Finding | None:
    """A layer took far more than its even share of a global budget."""
    if subject.config.scope != "global":
        raise NotCheckedError("scope 'layer' gives every layer the same")
    _need_growth(subject, limits)
    units = {name: float(subject.growth(name).sum()) for name in subject.layers}
    total, experts = sum(units.values()), sum(subject.layers.values())
    ratios = {name: units[name] / (total * n / experts) for name, n in subject.layers.items()}
    first = max(ratios, key=lambda name: ratios[name])
    above = sum(ratio >= limits.monopoly_ratio for ratio in ratios.values())
    if not above:
        return None
    return Finding(
        f"layer {first!r} grew by {ratios[first]:.1f} times its even share; {above} of "
        f"{len(units)} layers by {limits.monopoly_ratio:g} times or more",
        f"a larger layer_floor than {subject.config.layer_floor:g}, a smaller layer_ceiling than "
        f"{subject.config.mean_rank_ceiling}, or scope 'layer'",
        {"growth_over_even_share": ratios},
    )


def _need_growth(subject: Subject, limits: Thresholds) -> None:
    if subject.config.policy in ("uniform", "prune"):
        raise NotCheckedError(f"policy {subject.config.policy!r} does not grow")
    if subject.config.r_target == subject.config.r_init:
        raise NotCheckedError("r_init = r_target: nothing grows")
    if (progress := subject.progress()) < limits.progress:
        raise NotCheckedError(
            f"{progress:.0%} of the growth is placed; this check needs {limits.progress:.0%}"
        )
