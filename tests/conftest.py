"""Hypothesis profiles: HYPOTHESIS_PROFILE=fast (default), ci (the same examples always) or deep."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fast",
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "ci", settings.get_profile("fast"), max_examples=200, derandomize=True, print_blob=True
)
settings.register_profile(
    "deep", settings.get_profile("fast"), max_examples=2000, stateful_step_count=60
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "fast"))
