"""Intervals, tests and rank correlations, against known values, plain references and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.quality import statistics
from benchmarks.quality.statistics import (
    estimate,
    over_groups,
    sign_flip_p,
    spearman,
)
from tests.marks import one_in

numbers = st.lists(st.integers(-5, 5), min_size=2, max_size=8)


@pytest.mark.parametrize(
    ("groups", "seeds", "least"),
    one_in(2, [(1, 5, 0.87), (1, 10, 0.92), (4, 3, 0.90), (4, 5, 0.92)]),
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    groups: int, seeds: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """95 %, but for few values and the error of 400 simulations; noise differs between groups."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    generator = np.random.default_rng(5)
    held = []
    for trial in range(400):
        drawn = [
            generator.normal(0.3, scale, size=seeds) for scale in np.linspace(1.0, 2.0, groups)
        ]
        found = estimate(drawn, seed=trial)
        held.append(found.low <= 0.3 <= found.high)
    assert least <= np.mean(held) <= 0.985


def test_the_plain_percentile_interval_would_be_too_narrow() -> None:
    values = np.array([1.0, 2.0, 4.0, 7.0, 3.0])
    picks = np.random.default_rng(0).integers(5, size=(10_000, 5))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    found = estimate([values])
    assert found.low < low < values.mean() < high < found.high
    assert found.mean == values.mean()


def test_a_task_counts_once_however_many_seeds_it_has() -> None:
    found = estimate([np.zeros(20), np.ones(5)])
    assert found.mean == 0.5
    assert found.low == found.high == pytest.approx(0.5)


def test_an_interval_over_tasks_is_wide_where_tasks_differ() -> None:
    noise = np.linspace(-0.01, 0.01, 5)
    groups = [noise + level for level in (-1.0, 0.2, 0.1, -0.1, 0.15)]
    assert estimate(groups).side == -1
    assert over_groups(groups).side == 0


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (1, 9), ()])
def test_too_few_values_have_no_interval(sizes: tuple[int, ...]) -> None:
    found = estimate([np.arange(size, dtype=float) for size in sizes])
    assert (found.low, found.high, found.side) == (-math.inf, math.inf, 0)


def test_the_interval_is_as_wide_as_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """For normal data; with many values the bootstrap means are normal, and so is the check."""
    monkeypatch.setattr(statistics, "RESAMPLES", 50_000)
    values = np.random.default_rng(3).normal(size=40)
    found = estimate([values])
    student = stats.t.interval(0.95, 39, values.mean(), values.std(ddof=1) / math.sqrt(40))
    assert (found.low, found.high) == pytest.approx(student, abs=0.03)


def test_estimates_repeat_exactly_and_leave_the_global_stream_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    values = [np.random.default_rng(0).normal(size=7)]
    assert estimate(values) == estimate(values)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]  # noqa: NPY002


@example([0, 1, 2, -1, -2])  # sums to 0, but for rounding
@given(numbers)
def test_the_exact_test_counts_all_sign_flips(values: list[int]) -> None:
    flips = itertools.product((1, -1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in flips]
    expected = sum(total >= abs(sum(values)) for total in sums) / len(sums)
    assert sign_flip_p([np.array(values)]) == pytest.approx(expected)


def test_a_single_value_is_no_evidence() -> None:
    assert sign_flip_p([np.array([3.0])]) == 1.0


def test_random_flips_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [np.random.default_rng(s).normal(0.4, size=6) for s in (1, 2)]
    exact = sign_flip_p(groups)
    monkeypatch.setattr(statistics, "EXACT_UP_TO", 3)
    assert 0.01 < exact < 0.5
    assert sign_flip_p(groups) == pytest.approx(exact, abs=0.02)


def test_the_test_rejects_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    p = [sign_flip_p([generator.normal(size=8)]) for _ in range(500)]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.08


def test_spearman_of_published_data() -> None:
    """Intelligence quotient and hours of television, the example of the Wikipedia article."""
    quotient = np.array([106, 86, 100, 101, 99, 103, 97, 113, 112, 110])
    hours = np.array([7, 0, 27, 50, 28, 29, 20, 12, 6, 17])
    assert spearman(quotient, hours) == pytest.approx(-29 / 165)


@given(numbers)
def test_spearman_is_the_correlation_of_midranks(values: list[int]) -> None:
    x, y = np.array(values), np.array(values[::-1]) ** 3 + np.arange(len(values))
    ranks = [[(v > w).sum() + ((v == w).sum() + 1) / 2 for v in w] for w in (x, y)]  # upside down
    if len(set(ranks[0])) == 1 or len(set(ranks[1])) == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(np.corrcoef(ranks)[0, 1])
        assert spearman(x, x) == pytest.approx(1.0)
