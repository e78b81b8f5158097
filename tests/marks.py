"""Marks for the cases of parametrized tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
