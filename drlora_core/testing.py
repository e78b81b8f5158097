"""Tools for writing your own growth policy: build a request, check a policy.

:func:`check_policy` needs hypothesis (``pip install hypothesis``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core.ema import IntArray
from drlora_core.errors import PolicyError
from drlora_core.policies import (
    REQUEST_ARRAYS,
    AllocationRequest,
    Policy,
    policy_name,
    run_policy,
)

__all__ = ["check_policy", "make_request"]


def make_request(
    quota: int,
    ranks: ArrayLike,
    limits: ArrayLike,
    *,
    saliency: ArrayLike | None = None,
    routing: ArrayLike | None = None,
    importance: ArrayLike | None = None,
    gamma: float | None = None,
    scale: ArrayLike | None = None,
    step: int = 1,
    seed: Sequence[int] = (0,),
) -> AllocationRequest:
    """Build the input of a policy; arrays that are left out are 1 for every expert.

    :class:`~drlora_core.policies.AllocationRequest` describes the arguments. ``saliency``, S at the
    present ranks, float [N], is a shortcut: it sets f to S, g to 1 and gamma to 0, so it cannot be
    combined with routing, importance, gamma or scale.

    Raises:
        ValueError: arrays of different lengths, negative values, saliency given twice.

    Example:
        >>> make_request(3, [1, 1], [2, 2], routing=[0.5, 0.25]).saliency.tolist()
        [0.25, 0.125]
    """
    if saliency is not None:
        if not all(given is None for given in (routing, importance, gamma, scale)):
            raise ValueError("give saliency, or routing, importance, gamma and scale, not both")
        routing, gamma = saliency, 0.0
    if quota < 0:
        raise ValueError(f"quota must be >= 0, got {quota}")
    size = np.size(ranks)
    return AllocationRequest(
        step=step,
        quota=quota,
        ranks=_check_array("ranks", ranks, size, np.int64),
        limits=_check_array("limits", limits, size, np.int64),
        routing=_check_array("routing", routing, size),
        importance=_check_array("importance", importance, size),
        gamma=1.0 if gamma is None else gamma,
        scale=_check_array("scale", scale, size),
        seed=tuple(seed),
    )


def _check_array(
    name: str, values: ArrayLike | None, size: int, dtype: type = np.float64, least: int = 0
) -> NDArray[Any]:
    whole = dtype is np.int64
    array = np.ones(size) if values is None else np.array(values, None if whole else dtype)
    valid = array.size and (not whole or array.dtype.kind in "iu")
    if not valid or not (np.isfinite(array).all() and (array >= least).all()):
        kind = "whole" if whole else "finite"
        raise ValueError(f"{name} must be a list of {kind} numbers >= {least}, got {values!r}")
    if array.shape != (size,):
        raise ValueError(f"{name} has shape {array.shape}; ranks have ({size},)")
    return array.astype(dtype)


def check_policy(policy: Policy, *, equivariant: bool = True, examples: int = 100) -> None:
    """Test a policy on generated requests.

    The answer must be int [N], within limits and quota, and the same for the same request; the
    input arrays must not change. If ``equivariant``, renumbering experts of different saliencies
    must renumber the answer in the same way.

    Args:
        policy: the callable to test.
        equivariant: False for a policy that uses the number of an expert on purpose.
        examples: number of requests; the same ones at every call.

    Raises:
        AssertionError: a sentence that names the violation and the smallest request that shows it.
        ImportError: hypothesis is not installed.

    Example:
        >>> from drlora_core.policies import greedy
        >>> check_policy(greedy, examples=10)
        >>> check_policy(lambda request: request.limits, examples=10)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: policy '<lambda>' at step 1, request quota=... units of a quota of ...
    """
    try:
        import hypothesis
        from hypothesis import strategies as st
    except ImportError as error:
        raise ImportError("check_policy needs hypothesis; pip install hypothesis") from error
    violations: list[str] = []

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        request, tied = _draw_request(data.draw)
        try:
            growth = _check_once(policy, request)
            if equivariant and not tied:
                order = data.draw(st.permutations(range(request.ranks.size)))
                _check_permuted(policy, request, growth, order)
        except AssertionError as error:
            violations.append(str(error))
            raise

    try:
        run()
    except Exception as error:  # hypothesis has errors of its own for answers that vary
        if not violations:
            raise
        raise AssertionError(violations[-1]) from error


def _draw_request(draw: Any) -> tuple[AllocationRequest, bool]:
    """Draw a request: with many ties (then also return True), or with scores that all differ."""
    from hypothesis import strategies as st

    size = draw(st.integers(1, 8))
    ranks = draw(st.lists(st.integers(1, 6), min_size=size, max_size=size))
    limits = draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    quota = draw(st.integers(0, sum(limits) + 3))
    gamma = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    tied = draw(st.booleans())
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    if tied:
        f, g = generator.choice([0.0, 0.5, 1.0], (2, size))
    else:  # from a continuous distribution, so that nothing a policy computes from it ties
        f, g = generator.random((2, size)) + 1e-3
    options: dict[str, Any] = {"routing": f, "importance": g, "gamma": gamma, "seed": [seed]}
    return make_request(quota, ranks, limits, **options), tied


def _select(request: AllocationRequest, order: Any) -> AllocationRequest:
    """Copy a request with its experts in another order."""
    arrays = {name: getattr(request, name)[order].copy() for name in REQUEST_ARRAYS}
    return dataclasses.replace(request, **arrays)


def _check_once(policy: Policy, request: AllocationRequest) -> IntArray:
    """Call the policy twice and check both answers; return the answer."""
    about, name = _describe(request), policy_name(policy)
    answers = []
    for _ in range(2):
        copy = _select(request, slice(None))
        try:
            answers.append(run_policy(policy, copy, about))
        except PolicyError as error:
            writes = f"policy {name!r} writes to its input: " if "read-only" in str(error) else ""
            raise AssertionError(f"{writes}{error}") from error
        for field in REQUEST_ARRAYS:
            if not np.array_equal(getattr(copy, field), getattr(request, field)):
                raise AssertionError(f"policy {name!r} writes to its input {field!r}: {about}")
    if not np.array_equal(answers[0], answers[1]):
        one, two = (answer.tolist() for answer in answers)
        raise AssertionError(f"policy {name!r} is not deterministic: {one}, then {two} for {about}")
    return answers[0]


def _check_permuted(
    policy: Policy, request: AllocationRequest, growth: IntArray, order: list[int]
) -> None:
    got = _check_once(policy, _select(request, order))
    if not np.array_equal(got, growth[order]):
        raise AssertionError(
            f"policy {policy_name(policy)!r} depends on the numbering of the experts (allowed with "
            f"equivariant=False): {growth.tolist()} for {_describe(request)}, but in the order "
            f"{order} it gives {got.tolist()}, not {growth[order].tolist()}"
        )


def _describe(request: AllocationRequest) -> str:
    return (
        f"request quota={request.quota}, ranks={request.ranks.tolist()}, "
        f"limits={request.limits.tolist()}, saliency={request.saliency.round(4).tolist()}"
    )
