"""Hypothesis profiles and threads.

HYPOTHESIS_PROFILE is fast (default), ci (always the same examples), deep, or few (ten examples,
always the same, and no search for a smaller one: a mutant is killed by any). Tests and the
processes that they start use one thread each: sums keep one order, and parallel tests do not
compete for cores. Without a GPU, Triton runs its kernels in an interpreter.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"  # read when NumPy and torch are imported

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

settings.register_profile(
    "fast",
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("ci", settings.get_profile("fast"), derandomize=True, print_blob=True)
settings.register_profile(
    "deep", settings.get_profile("fast"), max_examples=2000, stateful_step_count=60
)
settings.register_profile(
    "few",
    settings.get_profile("fast"),
    max_examples=10,
    stateful_step_count=15,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "fast"))


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Signals mean what they usually do, also in tests that run under ``nohup`` or after ``&``."""
    before = {name: signal.signal(name, signal.SIG_DFL) for name in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
