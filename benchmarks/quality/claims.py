"""The claims that the study tests, and the verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.quality.records import RunRecord
from benchmarks.quality.runs import RANK, Metric, Results, Setting, test_loss
from benchmarks.quality.statistics import Estimate, estimate, over_groups, sign_flip_p, spearman

DRLORA, UNIFORM, EARLY = "drlora", "uniform", "early"
SPROUT, GRADIENT = "sprout", "static_gradient"
NOT_RUN = "not run"
Relevance = Callable[[str, str], Mapping[str, np.ndarray] | None]
"""Maps (model, task) to the known relevance of each expert by layer, or None if it is unknown."""


@dataclass(frozen=True)
class Claim:
    """The first method ends with a lower test loss than the second at the same final budget."""

    text: str
    method: str
    base: str
    rank: int = RANK
    """Mean rank of the settings."""


CLAIMS = {
    "Claims of the paper, late growth": (
        Claim("DR-LoRA beats uniform LoRA", DRLORA, UNIFORM),
        Claim("DR-LoRA beats pruning from a larger rank", DRLORA, "prune"),
        Claim("Routing frequency f improves on g alone", DRLORA, "without_f"),
        Claim("Importance g improves on f alone", DRLORA, "without_g"),
    ),
    "Controls that the paper lacks, late growth": (
        Claim("Choosing experts beats growing all evenly", DRLORA, "uniform_growth"),
        Claim("Choosing experts beats growing random ones", DRLORA, "random"),
        Claim("Growth beats fixed ranks from a routing profile", DRLORA, "static_profile"),
    ),
    "Early growth": (
        Claim("Early growth beats uniform LoRA", EARLY, UNIFORM),
        Claim("Early growth beats late growth", EARLY, DRLORA),
        Claim("Early growth beats pruning", EARLY, "prune"),
        Claim("Choosing experts beats growing all evenly", EARLY, "early_uniform_growth"),
        Claim("Growth beats fixed ranks from a routing profile", EARLY, "static_profile"),
        Claim("Growth beats having its final ranks from the start", EARLY, "hindsight"),
    ),
    "Rivals of early growth": (
        Claim("Early growth beats LoRA on the busiest quarter of the experts", EARLY, "sieve"),
        Claim("Early growth beats fixed ranks from the gradients of one pass", EARLY, GRADIENT),
        Claim("Growth from rank 1 beats growth from rank 0", EARLY, "early_zero"),
        Claim("Early growth beats early growth that also moves rank", EARLY, "early_move"),
    ),
    "Sprout: early growth from rank 1": (
        Claim("Early growth beats uniform LoRA, mean rank 8", EARLY, UNIFORM, 8),
        Claim("Sprout beats uniform LoRA, mean rank 8", SPROUT, UNIFORM, 8),
        Claim("Sprout beats early growth, mean rank 8", SPROUT, EARLY, 8),
        Claim("Sprout beats early growth, mean rank 16", SPROUT, EARLY, 16),
    ),
}
"""By heading of the report."""
ALL_CLAIMS = tuple(claim for group in CLAIMS.values() for claim in group)
CLAIMED = frozenset(
    name for claim in ALL_CLAIMS if claim.rank == RANK for name in (claim.method, claim.base)
)
"""All methods that occur in a claim of mean rank ``RANK``."""


@dataclass(frozen=True)
class Comparison:
    """Paired differences of two methods in several settings; for a loss, negative is better."""

    groups: Mapping[Setting, np.ndarray]
    here: Estimate
    """Mean over these settings; the interval resamples seeds."""
    beyond: Estimate
    """The same mean; the interval resamples settings, so it covers similar settings."""
    p: float
    noise: float
    """Standard deviation of the second method between seeds, averaged over settings."""

    @property
    def wins(self) -> int:
        """Number of runs in which the first method has the lower value."""
        return sum(int((group < 0).sum()) for group in self.groups.values())

    def on_side(self, side: int) -> list[Setting]:
        """Settings whose own interval is below 0 (-1), above 0 (1), or contains 0 (0)."""
        return [s for s, group in self.groups.items() if estimate([group]).side == side]


def compare(
    results: Results,
    method: str,
    base: str,
    metric: Metric = test_loss,
    settings: Iterable[Setting] | None = None,
) -> Comparison:
    """Compare two methods, each at its best learning rate, in every setting that has both.

    By default, each pair of model and task counts once (``Results.primary``).
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


def compare_claim(
    results: Results, claim: Claim, metric: Metric = test_loss, *, held_out: bool | None = None
) -> Comparison:
    """Compare the two methods of a claim in the settings of its mean rank."""
    settings = results.primary(held_out=held_out, rank=claim.rank)
    return compare(results, claim.method, claim.base, metric, settings)


def verdict(comparison: Comparison, *, lower_is_better: bool = True) -> str:
    """Verdict on the claim that the first method is better.

    ``supported`` or ``contradicted`` if both intervals exclude 0; the same ``on these tasks`` if
    only the interval that resamples seeds does; otherwise ``inconclusive``.
    """
    if not comparison.groups:
        return NOT_RUN
    sign = -1 if lower_is_better else 1
    answer = _answer(sign * comparison.here.side)
    decided = comparison.here.side in {0, comparison.beyond.side}
    return answer if decided else f"{answer} on these tasks"


def _answer(side: int) -> str:
    return {1: "supported", -1: "contradicted", 0: "inconclusive"}[side]


def signals(record: RunRecord, relevance: Relevance | None) -> dict[str, Mapping[str, np.ndarray]]:
    """Signals to correlate with final ranks, by layer: f, g, their product, known relevance."""
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
    """Spearman correlation of final ranks with a signal, averaged over layers.

    Layers in which either is constant are skipped; nan if none is left.
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
    """Rank correlations of a method at its best learning rate, by setting and signal: [seeds]."""
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
    """Do final ranks follow the known relevance? Mean correlation and verdict."""
    groups = [values["relevance"] for values in table.values() if "relevance" in values]
    found = estimate(groups)
    return found, _answer(found.side) if groups else NOT_RUN
