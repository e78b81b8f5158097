"""Checks of the statistics: routing frequency f and rank importance g.

Shapes: N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from drlora_core.comparison import mean_of_defined, spearman
from drlora_core.diagnostics.subject import (
    Finding,
    NotCheckedError,
    Subject,
    Thresholds,
    window_means,
)
from drlora_core.ema import FloatArray
from drlora_core.recording import Recording


def unreliable_first_event(subject: Subject, limits: Thresholds) -> Finding | None:
    """The order of importance still changes before the first event."""
    recording = _need_recording(subject)
    config = subject.config
    if not config.growth_steps or not config.use_importance:
        raise NotCheckedError("no event depends on importance")
    before = min(config.growth_steps[0], recording.steps)
    correlation = _correlate_halves(recording, "importance", before, limits)
    if np.isnan(correlation) or correlation >= limits.reliable_correlation:
        return None
    return Finding(
        f"the first event (step {config.growth_steps[0]}) comes before importance is settled: "
        f"the rank correlation between the two halves of the steps before it is {correlation:.2f}",
        f"a longer warm-up than {config.warmup_steps} steps, larger batches, or a larger "
        f"importance_decay than {config.importance_decay:g}",
        {"rank_correlation": correlation, "steps": before},
    )


def never_routed(subject: Subject, limits: Thresholds) -> Finding | None:
    """The router never chose some experts."""
    routing = subject.routing
    if subject.recording is not None:
        routing = window_means(subject.recording, "routing", None, None)
    if not any(f.any() for f in routing.values()):
        raise NotCheckedError("no routing was observed")
    unused = {n: np.flatnonzero(f == 0.0).tolist() for n, f in routing.items() if not f.all()}
    if not unused:
        return None
    count, total = sum(map(len, unused.values())), sum(subject.layers.values())
    return Finding(
        f"{count} of {total} experts were never routed to in {subject.step} steps",
        "nothing for a narrow task: these experts keep r_init, and a smaller r_init or policy "
        "'prune' saves their rank; otherwise check the router and the attention mask",
        {"experts": unused, "share": count / total},
    )


def lost_traffic(subject: Subject, limits: Thresholds) -> Finding | None:
    """The router uses experts with much rank less than before the first event."""
    recording = _need_recording(subject)
    if not subject.events:
        raise NotCheckedError("there was no growth event yet")
    width = min(subject.events[0].step, recording.steps // 2)
    if width < limits.window:
        raise NotCheckedError(f"fewer than {2 * limits.window} steps")
    early = window_means(recording, "routing", 0, width)
    late = window_means(recording, "routing", recording.steps - width, None)
    if not early.keys() == late.keys() == subject.layers.keys():
        raise NotCheckedError("no routing was recorded")
    extra_units, lost_units, lost_experts = 0, 0, {}
    for name in subject.layers:
        extra = np.maximum(subject.ranks[name] - subject.config.r_target, 0)
        lost = (extra > 0) & (late[name] < (1.0 - limits.traffic_loss) * early[name])
        extra_units += int(extra.sum())
        lost_units += int(extra[lost].sum())
        if lost.any():
            lost_experts[name] = np.flatnonzero(lost).tolist()
    share = lost_units / extra_units if extra_units else 0.0
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
    if not subject.config.use_routing:
        raise NotCheckedError("the configuration does not use f")
    return _uninformative(subject, "routing", subject.routing, limits)


def uninformative_importance(subject: Subject, limits: Thresholds) -> Finding | None:
    """Rank importance is flat over the experts, or noise."""
    if not subject.config.use_importance:
        raise NotCheckedError("the configuration does not use g")
    return _uninformative(subject, "importance", subject.importance, limits)


def unrelated_signals(subject: Subject, limits: Thresholds) -> Finding | None:
    """Routing frequency and rank importance are not correlated."""
    values = [
        spearman(values, subject.importance[name])
        for name, values in subject.routing.items()
        if name in subject.importance
    ]
    mean = mean_of_defined(values)
    if np.isnan(mean):
        raise NotCheckedError("f or g is constant or was not observed")
    if abs(mean) > limits.unrelated_correlation:
        return None
    return Finding(
        f"f and g order the experts independently (mean rank correlation {mean:+.2f})",
        "compare with the ablations use_routing=False and use_importance=False: one of the two "
        "may decide alone",
        {"rank_correlation": mean, "layers": int((~np.isnan(values)).sum())},
        "note",
    )


def _uninformative(
    subject: Subject, name: str, signal: Mapping[str, FloatArray], limits: Thresholds
) -> Finding | None:
    used = [values for values in signal.values() if values.size > 1 and values.any()]
    if not used:
        raise NotCheckedError(f"no {name} was observed")
    variation = float(np.median([values.std() / values.mean() for values in used]))
    if variation < limits.flat_variation:
        return Finding(
            f"{name} hardly differs between experts (coefficient of variation {variation:.3f})",
            f"use_{name}=False loses nothing; if you expected a difference, check the samples",
            {"coefficient_of_variation": variation},
        )
    if subject.recording is None:
        return None
    correlation = _correlate_halves(subject.recording, name, subject.recording.steps, limits)
    if np.isnan(correlation) or correlation >= limits.noise_correlation:
        return None
    decay = getattr(subject.config, f"{name}_decay")
    return Finding(
        f"{name} is noise: the rank correlation between the halves of the run is {correlation:.2f}",
        f"larger batches, a {name}_decay above {decay:g}, or use_{name}=False",
        {"rank_correlation": correlation, "coefficient_of_variation": variation},
    )


def _need_recording(subject: Subject) -> Recording:
    if subject.recording is None:
        raise NotCheckedError("a live engine keeps no past samples; diagnose its recording")
    return subject.recording


def _correlate_halves(recording: Recording, signal: str, stop: int, limits: Thresholds) -> float:
    """Median over layers of the rank correlation between the halves of the first ``stop`` steps."""
    middle = stop // 2
    if middle < limits.window:
        raise NotCheckedError(f"fewer than {2 * limits.window} steps")
    first = window_means(recording, signal, 0, middle)
    second = window_means(recording, signal, middle, stop)
    values = np.array([spearman(first[name], second[name]) for name in first if name in second])
    values = values[~np.isnan(values)]
    return float(np.median(values)) if values.size else float("nan")
