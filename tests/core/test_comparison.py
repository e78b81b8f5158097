"""The measures equal their definitions."""

from __future__ import annotations

import math
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_core import DRLoRAError, LayoutError
from drlora_core.comparison import (
    churn,
    compare,
    entropy,
    gini,
    kendall,
    overlap,
    spearman,
    total_variation,
)
from drlora_core.recording import Recording
from drlora_core.replay import replay
from tests.core import recorded

ranks = st.lists(st.integers(1, 6), min_size=2, max_size=12)
pairs = st.integers(2, 12).flatmap(
    lambda size: st.tuples(
        *[st.lists(st.integers(1, 5), min_size=size, max_size=size) for _ in range(2)]
    )
)


def tau_by_definition(one: list[int], two: list[int]) -> float:
    signs = [
        (np.sign(one[i] - one[j]), np.sign(two[i] - two[j]))
        for i, j in combinations(range(len(one)), 2)
    ]
    untied = [sum(1 for pair in signs if pair[side]) for side in (0, 1)]
    if not all(untied):
        return math.nan
    return float(sum(a * b for a, b in signs)) / math.sqrt(untied[0] * untied[1])


def midranks(values: list[int]) -> list[float]:
    """Position of each value in ascending order; equal values share the mean."""
    return [
        sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values
    ]


@given(pairs)
def test_correlations(pair: tuple[list[int], list[int]]) -> None:
    one, two = pair
    np.testing.assert_allclose(kendall(one, two), tau_by_definition(one, two), atol=1e-12)
    constant = len(set(one)) == 1 or len(set(two)) == 1
    if constant:
        assert math.isnan(spearman(one, two))
        return
    expected = np.corrcoef(midranks(one), midranks(two))[0, 1]
    np.testing.assert_allclose(spearman(one, two), expected, atol=1e-12)
    np.testing.assert_allclose(spearman(one, one), 1.0)
    np.testing.assert_allclose(spearman(one, [-value for value in one]), -1.0)


@given(pairs)
def test_distances_are_bounded_symmetric_and_zero_for_equals(
    pair: tuple[list[int], list[int]],
) -> None:
    one, two = np.array(pair[0]), np.array(pair[1])
    assert 0.0 <= total_variation(one, two) <= 1.0
    assert total_variation(one, two) == total_variation(two, one)
    assert overlap(one, two) == overlap(two, one)
    assert total_variation(one, one) == 0.0
    assert overlap(one, one) == 1.0
    if one.sum() == two.sum():
        assert overlap(one, two) == pytest.approx(1.0 - total_variation(one, two))


@given(ranks)
def test_gini_is_the_mean_difference(values: list[int]) -> None:
    size = len(values)
    differences = sum(abs(a - b) for a in values for b in values)
    assert gini(values) == pytest.approx(differences / (2 * size * sum(values)))
    assert 0.0 <= entropy(values) <= 1.0 + 1e-12


def test_extremes() -> None:
    assert gini([0, 0]) == 0.0
    assert entropy([5]) == 1.0
    assert entropy([0, 0, 7, 0]) == 0.0
    assert churn([[1, 0], [1, 0]]) == 0.0
    assert churn([[1, 0], [0, 1]]) == 1.0
    assert churn([[1, 0], [0, 0], [1, 0]]) == 0.0
    assert math.isnan(churn([[1, 0]]))
    nothing, something = np.array([0, 0]), np.array([1, 3])
    assert math.isnan(total_variation(nothing, something))
    assert math.isnan(overlap(nothing, nothing))
    assert overlap(nothing, something) == 0.0


def test_without_scipy_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    for measure in (spearman, kendall):
        with pytest.raises(DRLoRAError, match=r'scipy.stats is not installed: .*"drlora\[cli\]"'):
            measure([1, 2], [2, 1])
    assert churn([[1, 0], [0, 1]]) == 1.0


def test_compare_names_the_experts_that_differ() -> None:
    falling = {"experts": np.array([[0.6, 0.3, 0.1]] * 16), "more": np.ones((16, 2))}
    rising = {"experts": np.array([[0.1, 0.3, 0.6]] * 16), "more": np.ones((16, 2))}
    config = recorded.config(use_importance=False)
    one, two = (replay(Recording.from_arrays(arrays), config) for arrays in (falling, rising))
    result = compare(one, two)
    assert one.final_ranks["experts"].tolist()[::-1] == two.final_ranks["experts"].tolist()
    experts, more = result.layers
    assert experts.spearman == -1.0
    assert experts.kendall == -1.0
    assert experts.differing == 2
    assert experts.overlap == pytest.approx(1 - experts.total_variation)
    assert more.differing == 0
    assert more.total_variation == 0.0
    first = result.differences[0]
    assert (first.layer, first.expert) == ("experts", 0)
    assert first.rank_a == one.final_ranks["experts"][0]
    assert result.summary()["differing"] == 2
    assert result.to_dict()["layers"][0]["layer"] == "experts"
    assert compare(one, one).differences == ()


def test_replays_of_other_layers_are_refused() -> None:
    config = recorded.config(use_importance=False)
    one = replay(Recording.from_arrays({"a": np.ones((16, 2))}), config)
    two = replay(Recording.from_arrays({"a": np.ones((16, 3))}), config)
    with pytest.raises(LayoutError, match="different layers"):
        compare(one, two)
