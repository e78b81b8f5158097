"""Marks for the cases of parametrized tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Mark every case as slow but those that stand for the others.

    Example:
        >>> [bool(case.marks) for case in slow_but(["a", "b"], ["b"])]
        [True, False]
    """
    known = list(cases)
    assert all(case in known for case in fast)
    return [pytest.param(case, marks=[] if case in fast else pytest.mark.slow) for case in known]


def slow_and_thinned(cases: Iterable[Sequence[Any]], every: int = 3) -> list[Any]:
    """Mark every case, a tuple, as slow; CI leaves out all but one in ``every``.

    Example:
        >>> [len(case.marks) for case in slow_and_thinned([("a", 1), ("b", 1), ("c", 1), ("d", 1)])]
        [1, 2, 2, 1]
    """
    slow, left_out = [pytest.mark.slow], [pytest.mark.slow, pytest.mark.exhaustive]
    return [
        pytest.param(*case, marks=left_out if i % every else slow) for i, case in enumerate(cases)
    ]


def one_in(every: int, cases: Iterable[Sequence[Any]]) -> list[Any]:
    """Mark all but one in ``every`` cases, which are tuples, as slow.

    Example:
        >>> [bool(case.marks) for case in one_in(2, [("a", 1), ("b", 1), ("c", 1)])]
        [False, True, False]
    """
    return [
        pytest.param(*case, marks=pytest.mark.slow if i % every else [])
        for i, case in enumerate(cases)
    ]
