"""The mark of tests that start processes that talk over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from torch import distributed

Test = TypeVar("Test", bound=Callable[..., object])

MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo"),
    # Threads of gloo have killed a process once in some hundred launches. What a process raises
    # is not run again.
    pytest.mark.flaky(reruns=1, only_rerun=["SIGSEGV", "SIGABRT", r"Signal (6|11) \("]),
]


def launches(test: Test) -> Test:
    """Mark a test as slow, in need of gloo, and run again if gloo ends one of its processes."""
    for mark in MARKS:
        test = mark(test)
    return test
