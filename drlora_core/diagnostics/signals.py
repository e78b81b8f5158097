"""Checks of what the statistics say: routing frequency f and rank importance g.

Shapes: N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from drlora_core.comparison import spearman
from drlora_core.diagnostics.finding import Finding, NotCheckedError, Thresholds
from drlora_core.diagnostics.subject import Subject, window_mean
from drlora_core.ema import FloatArray
from drlora_core.recording.data import Recording


def unreliable_first_event(subject: Subject, limits: Thresholds) -> Finding | None:
    """The order of importance still changes between the windows before the first event."""
    recording = _recording(subject)
    if not subject.config.growth_steps or not subject.config.use_importance:
        raise NotCheckedError("there is no event that importance decides")
    before = min(subject.config.growth_steps[0], recording.steps)
    correlation = _between_windows(recording, "importance", 0, before, limits)
    if np.isnan(correlation) or correlation >= limits.reliable_correlation:
        return None
    return Finding(
        "unreliable_first_event",
        "warning",
        f"the first event (step {subject.config.growth_steps[0]}) comes before importance is "
        f"settled: its order correlates by {correlation:.2f} between the halves of the steps "
        f"before",
        {"rank_correlation": correlation, "steps": before},
        f"a longer warm-up than {subject.config.warmup_steps} steps, larger batches, or a larger "
        f"importance_decay than {subject.config.importance_decay:g}",
    )


def never_routed(subject: Subject, limits: Thresholds) -> Finding | None:
    """Experts that the router never chose."""
    routing = subject.routing
    if subject.recording is not None:
        means = {
            name: window_mean(subject.recording, name, "routing", slice(None))
            for name in subject.layers
        }
        routing = {name: mean for name, mean in means.items() if mean is not None}
    if not routing or all(not f.any() for f in routing.values()):
        raise NotCheckedError("no routing was observed")
    unused = {name: np.flatnonzero(f == 0.0).tolist() for name, f in routing.items()}
    unused = {name: experts for name, experts in unused.items() if experts}
    if not unused:
        return None
    count, total = sum(map(len, unused.values())), sum(subject.layers.values())
    return Finding(
        "never_routed",
        "warning",
        f"{count} of {total} experts were never routed to in {subject.step} steps",
        {"experts": unused, "share": count / total},
        "nothing needs to be done for a narrow task (they keep r_init, and a smaller r_init or "
        "policy 'prune' frees their rank); else look at the router and at the attention mask",
    )


def lost_traffic(subject: Subject, limits: Thresholds) -> Finding | None:
    """Rank lies with experts that the router has left since they were chosen."""
    recording = _recording(subject)
    if not subject.events:
        raise NotCheckedError("there was no growth event yet")
    width = min(subject.events[0].step, recording.steps // 2)
    if width < limits.window:
        raise NotCheckedError(f"fewer than {2 * limits.window} steps")
    extra_units, lost_units, lost_experts = 0, 0, {}
    for name in subject.layers:
        early = window_mean(recording, name, "routing", slice(0, width))
        late = window_mean(recording, name, "routing", slice(recording.steps - width, None))
        if early is None or late is None:
            raise NotCheckedError("no routing was recorded")
        extra = np.maximum(subject.ranks[name] - subject.config.r_target, 0)
        lost = (extra > 0) & (late < (1.0 - limits.traffic_loss) * early)
        extra_units, lost_units = (
            extra_units + int(extra.sum()),
            lost_units + int(extra[lost].sum()),
        )
        if lost.any():
            lost_experts[name] = np.flatnonzero(lost).tolist()
    share = lost_units / extra_units if extra_units else 0.0
    if share < limits.misplaced_share:
        return None
    return Finding(
        "lost_traffic",
        "warning",
        f"{share:.0%} of the rank above r_target lies with experts that lost more than "
        f"{limits.traffic_loss:.0%} of their routing weight since the first event",
        {"share": share, "experts": lost_experts},
        "let the router train (router='after_warmup' or 'trainable') so that it can follow the "
        "ranks; if it does, grow later or let the routing average reach back further",
    )


def uninformative_routing(subject: Subject, limits: Thresholds) -> Finding | None:
    """f is flat over the experts, or noise."""
    if not subject.config.use_routing:
        raise NotCheckedError("the configuration does not use f")
    return _uninformative(subject, "routing", subject.routing, limits)


def uninformative_importance(subject: Subject, limits: Thresholds) -> Finding | None:
    """g is flat over the experts, or noise."""
    if not subject.config.use_importance:
        raise NotCheckedError("the configuration does not use g")
    return _uninformative(subject, "importance", subject.importance, limits)


def unrelated_signals(subject: Subject, limits: Thresholds) -> Finding | None:
    """F and g order the experts as if they were independent."""
    pairs = [
        (subject.routing[name], subject.importance[name])
        for name in subject.layers
        if name in subject.routing and name in subject.importance
    ]
    values = np.array([spearman(*pair) for pair in pairs])
    values = values[~np.isnan(values)]
    if not values.size:
        raise NotCheckedError("f or g is constant or was not observed")
    mean = float(values.mean())
    if abs(mean) > limits.unrelated_correlation:
        return None
    return Finding(
        "unrelated_signals",
        "note",
        f"f and g order the experts independently (mean rank correlation {mean:+.2f})",
        {"rank_correlation": mean, "layers": int(values.size)},
        "compare with the ablations use_routing=False and use_importance=False: one of the two "
        "may decide alone",
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
            f"uninformative_{name}",
            "warning",
            f"{name} hardly differs between experts (coefficient of variation {variation:.3f})",
            {"coefficient_of_variation": variation},
            f"use_{name}=False loses nothing; check what is fed if you expected a difference",
        )
    if subject.recording is None:
        return None
    steps = subject.recording.steps
    correlation = _between_windows(subject.recording, name, 0, steps, limits)
    if np.isnan(correlation) or correlation >= limits.noise_correlation:
        return None
    return Finding(
        f"uninformative_{name}",
        "warning",
        f"{name} is noise: its order correlates by {correlation:.2f} between the halves of the run",
        {"rank_correlation": correlation, "coefficient_of_variation": variation},
        f"larger batches, a {name}_decay above {getattr(subject.config, f'{name}_decay'):g}, or "
        f"use_{name}=False",
    )


def _recording(subject: Subject) -> Recording:
    if subject.recording is None:
        raise NotCheckedError("a live engine keeps no past samples; diagnose its recording")
    return subject.recording


def _between_windows(
    recording: Recording, signal: str, start: int, stop: int, limits: Thresholds
) -> float:
    """Median over layers of the rank correlation between the halves of the steps; NaN if flat."""
    middle = (start + stop) // 2
    if middle - start < limits.window:
        raise NotCheckedError(f"fewer than {2 * limits.window} steps")
    found = []
    for name in recording.layers:
        first = window_mean(recording, name, signal, slice(start, middle))
        second = window_mean(recording, name, signal, slice(middle, stop))
        if first is not None and second is not None:
            found.append(spearman(first, second))
    values = np.array(found)
    values = values[~np.isnan(values)]
    return float(np.median(values)) if values.size else float("nan")
