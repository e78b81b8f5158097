"""The equations on arrays are those of plain loops; edges that runs seldom reach."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import ema, policies, pruning, saliency, timetable
from drlora_core.policies import Policy
from drlora_core.testing import make_request
from tests import reference

TINY = float(np.finfo(np.float64).tiny)
generator = np.random.default_rng(5)


@pytest.mark.parametrize("size", [1, 5, ema.BLOCK, ema.BLOCK + 1, 2 * ema.BLOCK + 7])
@pytest.mark.parametrize("width", [None, 3])
def test_an_average_is_that_of_each_number(size: int, width: int | None) -> None:
    shape = (size,) if width is None else (size, width)
    average, first = np.zeros(shape), None
    samples = generator.random((3, *shape))
    for sample in samples:
        ema.update(average, sample, 0.75)
        first = average.copy() if first is None else first
    assert np.array_equal(first, 0.25 * samples[0])
    expected = (samples[0] * 0.75**2 + samples[1] * 0.75 + samples[2]) * 0.25
    np.testing.assert_allclose(average, expected, rtol=1e-14)


@pytest.mark.parametrize("counts", [[], [0], [3], [0, 1, 2], [2, 0, 2, 2, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_bias_of_each_count_is_corrected(counts: list[int], decay: float) -> None:
    average = generator.random(len(counts))
    expected = [
        value / (1 - decay**count) if count else 0.0
        for value, count in zip(average.tolist(), counts, strict=True)
    ]
    found = ema.correct_bias(average, np.array(counts, dtype=np.int64), decay)
    assert found.tolist() == expected
    for value, count, corrected in zip(average, counts, expected, strict=True):
        assert ema.correct_bias(np.array([value]), count, decay).tolist() == [corrected]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_saliency_of_each_expert(gamma: float) -> None:
    f, g, ranks = generator.random(5), generator.random(5), np.array([0, 1, 2, 7, 30])
    expected = [f[i] * g[i] / (ranks[i] + 1) ** gamma for i in range(5)]
    np.testing.assert_allclose(saliency.saliency(f, g, ranks, gamma), expected, rtol=1e-14)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(5, 7))
def test_what_is_inactive_does_not_count(ranks: list[int], r_max: int) -> None:
    sample = generator.random((len(ranks), r_max))
    active = saliency.active_dimensions(np.array(ranks), r_max)
    assert active.tolist() == [[j < rank for j in range(r_max)] for rank in ranks]
    noisy = np.where(active, sample, np.nan)
    masked = saliency.mask_inactive(noisy, np.array(ranks))
    assert np.array_equal(masked, np.where(active, sample, 0.0))
    means = saliency.mean_over_active(masked, np.array(ranks))
    plain = [row[:rank].mean() if rank else 0.0 for row, rank in zip(sample, ranks, strict=True)]
    np.testing.assert_allclose(means, plain, rtol=1e-14)


@pytest.mark.parametrize(
    ("routing", "importance", "expected"),
    [
        ([0.5, 0.25, 0.25], [3.0, 1.5, 9.0], [3.0, 1.5, 1.5]),  # 6 of g for each 1 of f
        ([0.0, 0.0, 0.5], [3.0, 1.5, 9.0], [0.0, 0.0, 0.5]),  # no f is known
        ([0.5, 0.5, 0.5], [0.0, 0.0, 9.0], [0.5, 0.5, 0.5]),  # no g is known
        ([2.0, 2.0, 1.0], [1.0, 0.0, 9.0], [0.5, 0.5, 0.25]),
        ([5e-324, 0.0, 0.5], [1e308, 0.0, 9.0], [5e-324, 0.0, 0.5]),  # the quotient is too large
        ([TINY, 0.0, 0.5], [1.0, 0.0, 9.0], [TINY, 0.0, 0.5]),  # and may be
    ],
)
def test_an_expert_without_rank_is_worth_its_share(
    routing: list[float], importance: list[float], expected: list[float]
) -> None:
    """The third expert of each layer has no rank; the second layer knows nothing of importance."""
    f, g = np.array([*routing, 0.25, 0.75]), np.array([*importance, 8.0, 8.0])
    known = np.array([True, True, False, False, False])
    found = saliency.importance_at_zero(f, g, known, [3, 2])
    assert found.tolist() == [*expected, 0.25, 0.75]


@given(st.integers(0, 4), st.integers(1, 4), st.integers(0, 20))
def test_events_are_where_the_equation_puts_them(warmup: int, interval: int, end: int) -> None:
    steps = [t for t in range(1, end + 1) if t > warmup and (t - warmup) % interval == 0]
    assert list(timetable.growth_steps(warmup, interval, end)) == steps
    for t in range(end + 3):
        index = steps.index(t) + 1 if t in steps else None
        assert timetable.event_index(t, warmup, interval, end) == index


@given(st.integers(1, 7), st.integers(0, 40))
def test_quotas_of_all_events_are_the_budget(events: int, budget: int) -> None:
    quotas = [timetable.even_quota(k, events, budget) for k in range(1, events + 1)]
    assert sum(quotas) == budget
    assert max(quotas) - min(quotas) <= 1
    for start, k in ((budget + 9, 0), (budget + 9, events), (budget + 30, 1 + events // 2)):
        expected = reference.cubic_total(k, events, start, budget)
        assert timetable.cubic_total(k, events, start, budget) == expected


def test_moved_units_are_exact() -> None:
    assert [timetable.moved_units(k, 3, 0.3, 10) for k in (1, 2, 3)] == [3, 2, 1]
    assert timetable.moved_units(1, 1, 0.29, 100) == 29  # 0.29 * 100 < 29 in floating point


@pytest.mark.parametrize(
    ("warmup", "last", "events", "expected"),
    [
        (0, 10, 5, (2, 10)),
        (2, 13, 5, (2, 12)),
        (3, 4, 5, (1, 4)),  # room for a single event
        (3, 6, 5, (1, 6)),
        (4, 4, 5, (1, 4)),  # no room
        (5, 4, 5, (1, 4)),
    ],
)
def test_even_events_fit(warmup: int, last: int, events: int, expected: tuple[int, int]) -> None:
    assert timetable.even_events(warmup, last, events) == expected


def test_the_growth_cap_reaches_r_max() -> None:
    caps = [timetable.growth_cap(1, r_max, 3) for r_max in (1, 2, 4, 5, 7, 8)]
    assert caps == [1, 1, 1, 2, 2, 3]


ties = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(st.data(), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_the_cut_is_that_of_a_loop(data: st.DataObject, ranks: list[int]) -> None:
    r_max = 4
    rows = st.lists(ties, min_size=r_max, max_size=r_max)
    scores = data.draw(st.lists(rows, min_size=len(ranks), max_size=len(ranks)))
    kept = data.draw(
        st.integers(0, 2) | st.lists(st.integers(0, 4), min_size=len(ranks), max_size=len(ranks))
    )
    keep = [kept] * len(ranks) if isinstance(kept, int) else kept
    spare = [max(rank - least, 0) for rank, least in zip(ranks, keep, strict=True)]
    count = data.draw(st.integers(0, sum(spare)))
    expected = reference.prune(scores, ranks, count, spare)
    arrays: Any = np.array(scores), np.array(ranks), count
    given_keep: Any = kept if isinstance(kept, int) else np.array(kept)
    cut = pruning.least_important(*arrays, given_keep)
    assert cut.dtype == np.bool_
    assert {tuple(place) for place in np.argwhere(cut).tolist()} == expected


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_ties_of_many_dimensions_are_cut_from_the_end(keep: int | None) -> None:
    """Sorts that are not stable keep the order of few numbers."""
    ranks, scores = [40, 40, 38], generator.choice([0.0, 0.5], (3, 40))
    scores[:2, 30:] = 0.5  # the last dimensions of two experts differ in nothing but the expert
    least = 1 if keep is None else keep
    spare = [rank - least for rank in ranks]
    options = {} if keep is None else {"keep": keep}
    for count in (*range(1, 12), sum(spare) - 1, sum(spare)):
        cut = pruning.least_important(scores, np.array(ranks), count, **options)
        expected = reference.prune(scores.tolist(), ranks, count, spare)
        assert {tuple(place) for place in np.argwhere(cut).tolist()} == expected
    many = generator.choice([0.0, 0.5], (64, 64))
    cut = pruning.least_important(many, np.full(64, 64), 64 * (64 - least), **options)
    for row, gone in zip(many.tolist(), cut, strict=True):
        best = sorted(range(64), key=lambda j: (-row[j], j))[:least]
        assert np.flatnonzero(~gone).tolist() == sorted(best)
    marks = generator.random((1, 40)) < 0.5
    order = pruning.follow(pruning.initial_order(1, 40), marks)[0].tolist()
    kept = np.flatnonzero(~marks[0]).tolist()
    assert order == [*kept, *np.flatnonzero(marks[0]).tolist()]
    values = np.arange(1.0, 41.0)[None]
    assert pruning.compact(values, marks)[0, : len(kept)].tolist() == values[~marks].tolist()


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3))
def test_what_is_kept_comes_first_in_order(marks: list[list[bool]]) -> None:
    cut = np.array(marks)
    values = generator.random(cut.shape) + 1.0
    order = pruning.initial_order(*cut.shape)
    assert order.dtype == np.int64
    assert order.tolist() == [[0, 1, 2, 3]] * len(marks)
    compacted, followed = pruning.compact(values, cut), pruning.follow(order[:, ::-1], cut)
    for row, mark in enumerate(marks):
        kept = [j for j in range(4) if not mark[j]]
        gone = [j for j in range(4) if mark[j]]
        assert compacted[row].tolist() == [*values[row, kept].tolist(), *[0.0] * len(gone)]
        assert followed[row].tolist() == [3 - j for j in (*kept, *gone)]


def test_a_sample_gets_the_numbers_of_the_start() -> None:
    sample = np.array([[0.5, 0.25, 9.0], [1.0, 2.0, 3.0]])
    order = np.array([[2, 0, 1], [1, 2, 0]])
    found = pruning.to_recorded(sample, np.array([2, 3]), order)
    np.testing.assert_array_equal(found, [[0.25, np.nan, 0.5], [3.0, 1.0, 2.0]])


@pytest.mark.parametrize("policy", [policies.greedy, policies.rescored, policies.proportional])
@pytest.mark.parametrize("offers", [1, 4, 5, 9])
def test_a_quota_for_all_that_fits_is_spent(policy: Policy, offers: int) -> None:
    limits = [offers] * 3
    request = make_request(
        quota=3 * offers, ranks=[1, 2, 3], limits=limits, routing=[0.2, 0.3, 0.5]
    )
    assert policy(request).tolist() == limits
    short = dataclasses.replace(request, quota=3 * offers - 1)
    assert int(policy(short).sum()) == 3 * offers - 1
