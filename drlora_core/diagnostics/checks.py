"""The checks: each returns a finding, or None if it finds no problem.

Shapes: N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from drlora_core.comparison import mean_of_defined, spearman, total_variation
from drlora_core.diagnostics.subject import (
    Finding,
    NotCheckedError,
    Subject,
    Thresholds,
    window_means,
)
from drlora_core.ema import FloatArray
from drlora_core.events import event_quota
from drlora_core.pools import make_pools
from drlora_core.recording import Recording


def saturated_growth(subject: Subject, limits: Thresholds) -> Finding | None:
    """A few experts took all the growth and reached r_max."""
    subject.need_growth(limits.progress)
    config = subject.config
    if config.policy == "move":
        raise NotCheckedError("policy 'move' cuts ranks too, so growth is not what ranks show")
    growth = np.concatenate([subject.growth(name) for name in subject.layers])
    ranks = np.concatenate([subject.ranks[name] for name in subject.layers])
    served = float((growth > 0).mean())
    fewest = float(growth.mean()) / (config.r_max - config.r_init)
    full_share = float(growth[ranks == config.r_max].sum() / growth.sum())
    most = min(limits.few_experts, limits.few_factor * fewest)
    if served > most or full_share < limits.full_share:
        return None
    by_design = config.policy == "greedy" and config.max_growth is None
    return Finding(
        f"{served:.0%} of the experts got all the growth; {full_share:.0%} of it went to experts "
        f"at r_max {config.r_max}",
        "the greedy walk fills an expert in one event: set max_growth or policy 'rescored'"
        if by_design
        else f"a gamma above {config.gamma:g}, a smaller max_growth or a smaller r_max",
        {
            "experts_served": served,
            "fewest_possible": fewest,
            "share_of_full_experts": full_share,
            "gamma": config.gamma,
        },
        "note" if by_design else "warning",
    )


def even_growth(subject: Subject, limits: Thresholds) -> Finding | None:
    """The ranks are almost those of uniform LoRA."""
    subject.need_growth(limits.progress)
    distances = {
        name: total_variation(ranks, np.ones_like(ranks))
        for name, ranks in subject.ranks.items()
        if ranks.any()
    }
    if not distances:
        raise NotCheckedError("no expert has rank")
    median = float(np.median(list(distances.values())))
    if median > limits.even_distance:
        return None
    gamma = subject.config.gamma
    return Finding(
        f"the ranks differ from uniform LoRA by only {median:.1%} of the units (layer median)",
        f"a smaller gamma than {gamma:g}, fewer events, or uniform LoRA, which costs less",
        {"distance_from_even": distances, "gamma": gamma},
    )


def stagnant_growth(subject: Subject, limits: Thresholds) -> Finding | None:
    """The last events placed nothing although quota was due and budget is left."""
    config = subject.config
    if subject.events is None:
        raise NotCheckedError("a live engine keeps no past events; diagnose its recording")
    subject.need_growth_policy()
    if len(subject.events) < limits.stagnant_events:
        raise NotCheckedError(f"fewer than {limits.stagnant_events} events")
    last = subject.events[-limits.stagnant_events :]
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
        "check the policy, r_max and max_growth, or set an earlier growth_end",
        {"units_left": stuck, "events": [event.step for event in last]},
    )


def unplaced_quota(subject: Subject, limits: Thresholds) -> Finding | None:
    """Limits left quota unplaced."""
    subject.need_growth_policy()
    if subject.events == ():
        raise NotCheckedError("there was no growth event yet")
    if subject.unplaced == 0:
        return None
    config = subject.config
    full = float((np.concatenate(list(subject.ranks.values())) == config.r_max).mean())
    return Finding(
        f"limits left {subject.unplaced} units unplaced; {full:.0%} of the experts are at r_max",
        f"a max_growth above {config.max_growth}, an r_max above {config.r_max}, or more events",
        {"units": subject.unplaced, "experts_at_r_max": full},
    )


def monopolised_budget(subject: Subject, limits: Thresholds) -> Finding | None:
    """A layer took far more than its even share of a global budget."""
    config = subject.config
    if config.scope != "global":
        raise NotCheckedError("scope 'layer' gives every layer the same")
    subject.need_growth(limits.progress)
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
        f"a larger layer_floor than {config.layer_floor:g}, a smaller layer_ceiling than "
        f"{config.mean_rank_ceiling}, or scope 'layer'",
        {"growth_over_even_share": ratios},
    )


def unreliable_first_event(subject: Subject, limits: Thresholds) -> Finding | None:
    """The order of importance still changes before the first event."""
    recording, config = subject.need_recording(), subject.config
    if not config.growth_steps or not config.use_importance:
        raise NotCheckedError("no event depends on importance")
    before = min(config.growth_steps[0], recording.steps)
    correlation = _correlate_halves(recording, "importance", before, limits)
    if np.isnan(correlation):
        raise NotCheckedError("importance is constant or was not observed")
    if correlation >= limits.reliable_correlation:
        if before < config.growth_steps[0]:
            raise NotCheckedError(f"the first event, at step {config.growth_steps[0]}, is ahead")
        return None
    return Finding(
        f"importance is noise before the first event (step {config.growth_steps[0]}): the rank "
        f"correlation between the halves of the steps before it is {correlation:.2f}",
        f"a warm-up of more than {config.warmup_steps} steps, larger batches, or an "
        f"importance_decay above {config.importance_decay:g}",
        {"rank_correlation": correlation, "steps": before},
    )


def never_routed(subject: Subject, limits: Thresholds) -> Finding | None:
    """The router never chose some experts."""
    recording = subject.recording
    routing = window_means(recording, "routing") if recording else subject.routing
    if not any(f.any() for f in routing.values()):
        raise NotCheckedError("no routing was observed")
    unused = {n: np.flatnonzero(f == 0.0).tolist() for n, f in routing.items() if not f.all()}
    if not unused:
        return None
    count, total = sum(map(len, unused.values())), sum(subject.layers.values())
    return Finding(
        f"{count} of {total} experts were never routed to in {subject.step} steps",
        "nothing for a narrow task: these experts keep r_init, and a smaller r_init or the "
        "policies 'prune' and 'move' save their rank; otherwise check the router and the "
        "attention mask",
        {"experts": unused, "share": count / total},
    )


def lost_traffic(subject: Subject, limits: Thresholds) -> Finding | None:
    """The router uses experts with much rank less than before the first event."""
    recording = subject.need_recording()
    if not subject.events:
        raise NotCheckedError("there was no growth event yet")
    width = min(subject.events[0].step, recording.steps // 2)
    _need_window(width, limits)
    early = window_means(recording, "routing", 0, width)
    late = window_means(recording, "routing", recording.steps - width)
    if not early.keys() == late.keys() == subject.layers.keys():
        raise NotCheckedError("no routing was recorded")
    extra_units, lost_units, lost_experts = 0, 0, {}
    for name, ranks in subject.ranks.items():
        extra = np.maximum(ranks - subject.config.r_target, 0)
        lost = (extra > 0) & (late[name] < (1.0 - limits.traffic_loss) * early[name])
        extra_units += int(extra.sum())
        lost_units += int(extra[lost].sum())
        if lost.any():
            lost_experts[name] = np.flatnonzero(lost).tolist()
    if not extra_units:
        raise NotCheckedError(f"no expert is above r_target {subject.config.r_target}")
    share = lost_units / extra_units
    if share < limits.misplaced_share:
        return None
    return Finding(
        f"{share:.0%} of the rank above r_target belongs to experts that lost more than "
        f"{limits.traffic_loss:.0%} of their routing weight since the first event",
        "train the router (router='after_warmup' or 'trainable'), so that it can follow the "
        "ranks; if it is trained already, grow later or use a larger routing_decay",
        {"share": share, "experts": lost_experts},
    )


def uninformative_routing(subject: Subject, limits: Thresholds) -> Finding | None:
    """Routing frequency is flat over the experts, or noise."""
    return _uninformative(subject, "routing", limits)


def uninformative_importance(subject: Subject, limits: Thresholds) -> Finding | None:
    """Rank importance is flat over the experts, or noise."""
    return _uninformative(subject, "importance", limits)


def unrelated_signals(subject: Subject, limits: Thresholds) -> Finding | None:
    """Routing frequency and rank importance are not correlated."""
    values = _correlate(subject.routing, subject.importance)
    mean = mean_of_defined(values)
    if np.isnan(mean):
        raise NotCheckedError("f or g is constant or was not observed")
    if abs(mean) > limits.unrelated_correlation:
        return None
    return Finding(
        f"f and g order the experts independently (mean rank correlation {mean:+.2f})",
        "compare with use_routing=False and use_importance=False: one signal may decide alone",
        {"rank_correlation": mean, "layers": int((~np.isnan(values)).sum())},
        "note",
    )


def _uninformative(subject: Subject, signal: str, limits: Thresholds) -> Finding | None:
    if not getattr(subject.config, f"use_{signal}"):
        symbol = "f" if signal == "routing" else "g"
        raise NotCheckedError(f"the configuration does not use {symbol}")
    by_layer: Mapping[str, FloatArray] = getattr(subject, signal)
    used = [values for values in by_layer.values() if values.size > 1 and values.any()]
    if not used:
        raise NotCheckedError(f"no {signal} was observed")
    variation = float(np.median([values.std() / values.mean() for values in used]))
    if variation < limits.flat_variation:
        return Finding(
            f"{signal} hardly differs between experts (coefficient of variation {variation:.3f})",
            f"use_{signal}=False loses nothing; if you expected a difference, check the samples",
            {"coefficient_of_variation": variation},
        )
    if subject.recording is None:
        return None
    correlation = _correlate_halves(subject.recording, signal, subject.recording.steps, limits)
    if np.isnan(correlation) or correlation >= limits.noise_correlation:
        return None
    decay = getattr(subject.config, f"{signal}_decay")
    return Finding(
        f"{signal} is noise: rank correlation {correlation:.2f} between the halves of the run",
        f"larger batches, a larger {signal}_decay than {decay:g}, or use_{signal}=False",
        {"rank_correlation": correlation, "coefficient_of_variation": variation},
    )


def _correlate(one: Mapping[str, FloatArray], two: Mapping[str, FloatArray]) -> FloatArray:
    """Rank correlation of each layer that both have; NaN where one side is constant."""
    return np.array([spearman(one[name], two[name]) for name in one if name in two])


def _correlate_halves(recording: Recording, signal: str, stop: int, limits: Thresholds) -> float:
    """Median over layers of the rank correlation between the halves of the first ``stop`` steps."""
    middle = stop // 2
    _need_window(middle, limits)
    first = window_means(recording, signal, 0, middle)
    values = _correlate(first, window_means(recording, signal, middle, stop))
    return float(np.nanmedian(values)) if not np.isnan(values).all() else float("nan")


def _need_window(width: int, limits: Thresholds) -> None:
    if width < limits.window:
        raise NotCheckedError(f"fewer than {2 * limits.window} steps")


CHECKS: Mapping[str, Callable[[Subject, Thresholds], Finding | None]] = {
    check.__name__: check
    for check in (
        saturated_growth,
        even_growth,
        stagnant_growth,
        unplaced_quota,
        monopolised_budget,
        unreliable_first_event,
        never_routed,
        lost_traffic,
        uninformative_routing,
        uninformative_importance,
        unrelated_signals,
    )
}
"""Every check, by name."""
