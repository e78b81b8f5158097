"""The claims of the paper, and what the runs say about each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.records import RunRecord
from benchmarks.quality.runs import Metric, Results, Setting, exact_match, test_loss
from benchmarks.quality.statistics import Estimate, estimate, over_groups, sign_flip_p, spearman

DRLORA, UNIFORM, EARLY = "drlora", "uniform", "early"
NOT_RUN = "not run"
Relevance = Callable[[str, str], Mapping[str, np.ndarray] | None]
"""Model and task to the known relevance of each expert by layer; None where it is not known."""


@dataclass(frozen=True)
class Claim:
    """That one method ends better than another at the same final total rank."""

    text: str
    paper: str
    method: str
    base: str


CLAIMS = (
    Claim(
        "Growing ranks where the task leans beats uniform LoRA at equal parameters",
        "+1.8 to +1.9 points of average accuracy on OLMoE-1B-7B and Phi MoE",
        DRLORA,
        UNIFORM,
    ),
    Claim("Growth beats pruning", "claimed", DRLORA, "prune"),
    Claim("Routing frequency f is needed beside g", "claimed", DRLORA, "without_f"),
    Claim("Rank importance g is needed beside f", "claimed", DRLORA, "without_g"),
    Claim(
        "It matters where rank goes, not that it comes late",
        "no such control",
        DRLORA,
        "uniform_growth",
    ),
    Claim("The signals choose better than chance", "no such control", DRLORA, "random"),
    Claim(
        "Measuring while training beats a profile before it",
        "no such control",
        DRLORA,
        "static_profile",
    ),
    Claim("Growing early beats growing late", "no such comparison", EARLY, DRLORA),
    Claim("Growing early beats uniform LoRA", "no such comparison", EARLY, UNIFORM),
    Claim("Growing early beats pruning", "no such comparison", EARLY, "prune"),
    Claim("Growing early beats a profile before it", "no such control", EARLY, "static_profile"),
    Claim(
        "Growing early needs the signals too",
        "no such control",
        EARLY,
        "early_uniform_growth",
    ),
    Claim("Growing does more than its final ranks alone", "no such control", EARLY, "hindsight"),
)
CLAIMED = frozenset(name for claim in CLAIMS for name in (claim.method, claim.base))
"""The methods that the claims are about."""


@dataclass(frozen=True)
class Comparison:
    """A method against another over several settings; negative is better for a loss."""

    groups: Mapping[Setting, np.ndarray]
    here: Estimate
    """Over the settings at hand: only the seeds are resampled."""
    beyond: Estimate
    """Over settings like these: the settings are resampled."""
    p: float
    noise: float
    """Standard deviation of the base between seeds, its mean over the settings."""

    @property
    def wins(self) -> int:
        """In how many runs the method has the lower value."""
        return sum(int((group < 0).sum()) for group in self.groups.values())

    def sides(self) -> tuple[int, int, int]:
        """In how many settings the method is lower, higher, and not told apart from the base."""
        sides = [estimate([group]).side for group in self.groups.values()]
        return sides.count(-1), sides.count(1), sides.count(0)


def compare(
    results: Results,
    method: str,
    base: str,
    metric: Metric = test_loss,
    settings: Iterable[Setting] | None = None,
) -> Comparison:
    """Compare two methods, each at its best learning rate, in every setting that has both.

    Without ``settings``, each model and task counts once (``Results.primary``).
    """
    settings = results.primary() if settings is None else settings
    groups = results.groups(method, base, metric, settings)
    values = list(groups.values())
    spreads = [results.cells[s][base].values(metric) for s in groups]
    spreads = [spread.std(ddof=1) for spread in spreads if spread.size > 1]
    return Comparison(
        groups,
        estimate(values),
        over_groups(values),
        sign_flip_p(values),
        float(np.mean(spreads)) if spreads else float("nan"),
    )


def verdict(comparison: Comparison, *, lower_is_better: bool = True) -> str:
    """What a comparison says about the claim that the method is better; computed, never written.

    ``holds`` and ``does not hold`` need an interval on one side of 0 twice: over the seeds of the
    settings at hand, and over the settings.
    """
    if not comparison.groups:
        return NOT_RUN
    sign = -1 if lower_is_better else 1
    here, beyond = sign * comparison.here.side, sign * comparison.beyond.side
    if here == 0:
        return "undecided"
    answer = "holds" if here > 0 else "does not hold, the opposite does"
    return answer if beyond == here else f"{answer}, on average over these tasks; undecided beyond"


def verdicts(results: Results, claim: Claim) -> tuple[Comparison, Comparison, str, str]:
    """Compare by test loss and by exact match; the two comparisons and their verdicts."""
    loss = compare(results, claim.method, claim.base)
    match = compare(results, claim.method, claim.base, exact_match)
    return loss, match, verdict(loss), verdict(match, lower_is_better=False)


def signals(record: RunRecord, relevance: Relevance | None) -> dict[str, Mapping[str, np.ndarray]]:
    """What final ranks may follow, by layer: f, g, their product, and the known relevance."""
    found: dict[str, Mapping[str, np.ndarray]] = {}
    f = {name: np.array(values) for name, values in record.routing.items()}
    g = {name: np.array(values) for name, values in record.importance.items()}
    if f:
        found["f"] = f
    if g:
        found["g"] = g
    if f and g:
        found["f g"] = {name: f[name] * g[name] for name in f.keys() & g.keys()}
    known = relevance(record.spec.model, record.spec.task) if relevance is not None else None
    if known is not None:
        found["relevance"] = known
    return found


def rank_correlation(record: RunRecord, signal: Mapping[str, np.ndarray]) -> float:
    """Spearman's correlation of a run's final ranks with a signal: its mean over the layers.

    Layers in which either is constant have none; nan if no layer has one.
    """
    values = [
        spearman(np.array(ranks), np.asarray(signal[layer]))
        for layer, ranks in record.ranks.items()
        if layer in signal
    ]
    values = [value for value in values if np.isfinite(value)]
    return float(np.mean(values)) if values else float("nan")


def correlations(
    results: Results, method: str, relevance: Relevance | None = None
) -> dict[Setting, dict[str, np.ndarray]]:
    """Rank correlations of a method's runs at its best rate: by setting and signal, [seeds]."""
    table: dict[Setting, dict[str, np.ndarray]] = {}
    for setting, cells in results.cells.items():
        runs = list(cells[method].chosen().values()) if method in cells else []
        by_signal: dict[str, list[float]] = {}
        for record in runs:
            for name, signal in signals(record, relevance).items():
                by_signal.setdefault(name, []).append(rank_correlation(record, signal))
        arrays = {name: np.array(values) for name, values in by_signal.items()}
        finite = {name: values[np.isfinite(values)] for name, values in arrays.items()}
        if kept := {name: values for name, values in finite.items() if values.size}:
            table[setting] = kept
    return table


def relevance_verdict(table: Mapping[Setting, Mapping[str, np.ndarray]]) -> tuple[Estimate, str]:
    """Whether final ranks follow the known relevance, over the settings in which it is known."""
    groups = [values["relevance"] for values in table.values() if "relevance" in values]
    found = estimate(groups)
    if not groups:
        return found, NOT_RUN
    return found, {1: "holds", -1: "does not hold, the opposite does", 0: "undecided"}[found.side]
