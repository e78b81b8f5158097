"""Help for people who write their own growth policy: build a request, check a policy.

:func:`check_policy` needs hypothesis (``pip install hypothesis``); :func:`make_request` does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import PolicyError
from drlora_core.policies import AllocationRequest, Policy, run_policy

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["check_policy", "make_request"]

_ARRAYS = ("ranks", "limits", "routing", "importance", "scale")


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
    """Build the input of a policy; what is left out is 1 for every expert.

    Args:
        quota: rank units to place, >= 0.
        ranks: active ranks, whole numbers [N], >= 1.
        limits: most units each expert may get, whole numbers [N], >= 0.
        saliency: S at the present ranks, float [N], as a shortcut: sets f to S, g to 1 and gamma
            to 0, so it cannot be combined with routing, importance, gamma or scale.
        routing: f, float [N].
        importance: g, float [N].
        gamma: exponent of the rank penalty (1).
        scale: what S is divided by, float [N].
        step: optimizer step of the event.
        seed: seed of ``request.generator()``.

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
    whole = _whole("ranks", ranks, 1)
    if quota < 0:
        raise ValueError(f"quota must be >= 0, got {quota}")
    return AllocationRequest(
        step=step,
        quota=quota,
        ranks=whole,
        limits=_fits("limits", _whole("limits", limits, 0), whole.size),
        routing=_numbers("routing", routing, whole.size),
        importance=_numbers("importance", importance, whole.size),
        gamma=1.0 if gamma is None else gamma,
        scale=_numbers("scale", scale, whole.size),
        seed=tuple(seed),
    )


def _whole(name: str, values: ArrayLike, least: int) -> IntArray:
    array = np.array(values)
    if array.dtype.kind not in "iu" or array.ndim != 1 or not array.size or array.min() < least:
        raise ValueError(f"{name} must be a list of whole numbers >= {least}, got {values!r}")
    return array.astype(np.int64)


def _numbers(name: str, values: ArrayLike | None, size: int) -> FloatArray:
    array = np.ones(size) if values is None else np.array(values, dtype=np.float64)
    if not (np.isfinite(array).all() and (array >= 0.0).all()):
        raise ValueError(f"{name} must hold finite numbers >= 0, got {values!r}")
    checked: FloatArray = _fits(name, array, size)
    return checked


def _fits(name: str, array: NDArray[Any], size: int) -> NDArray[Any]:
    if array.shape != (size,):
        raise ValueError(f"{name} has shape {array.shape}; ranks have ({size},)")
    return array


def check_policy(policy: Policy, *, equivariant: bool = True, examples: int = 100) -> None:
    """Try a policy on generated requests; the first violation of its contract is an error.

    Checked: an integer array of the right shape comes back; no growth is negative or above its
    limit; the quota is never exceeded; the same request gives the same answer; the input arrays
    are left alone; and, if ``equivariant``, renumbering experts whose saliencies differ renumbers
    the answer alike.

    Args:
        policy: the callable under test.
        equivariant: False for a policy that looks at the number of an expert on purpose.
        examples: requests to try; the same ones at every call.

    Raises:
        AssertionError: a sentence naming the violation and the smallest request that shows it.
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
    @hypothesis.given(_requests(equivariant))
    def run(example: tuple[AllocationRequest, list[int] | None]) -> None:
        request, permutation = example
        try:
            _check_once(policy, request)
            if permutation is not None:
                _check_permuted(policy, request, permutation)
        except AssertionError as error:
            violations.append(str(error))
            raise

    try:
        run()
    except Exception as error:  # hypothesis has errors of its own for answers that vary
        if not violations:
            raise
        raise AssertionError(violations[-1]) from error


def _requests(
    equivariant: bool,
) -> SearchStrategy[tuple[AllocationRequest, list[int] | None]]:
    """Requests, half of them with many ties, half with scores that all differ and a permutation."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: st.DrawFn) -> tuple[AllocationRequest, list[int] | None]:
        size = draw(st.integers(1, 8))
        ranks = draw(st.lists(st.integers(1, 6), min_size=size, max_size=size))
        limits = draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
        quota = draw(st.integers(0, sum(limits) + 3))
        gamma = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
        tied = draw(st.booleans())
        seed = draw(st.integers(0, 2**32 - 1))
        generator = np.random.default_rng(seed)
        if tied:
            routing, importance = generator.choice([0.0, 0.5, 1.0], (2, size))
        else:  # drawn from the whole interval: no ties, nor ties of what a policy computes from it
            routing, importance = generator.random((2, size)) + 1e-3
        permutation = draw(st.permutations(range(size))) if equivariant and not tied else None
        request = make_request(
            quota, ranks, limits, routing=routing, importance=importance, gamma=gamma, seed=[seed]
        )
        return request, permutation

    return build()


def _check_once(policy: Policy, request: AllocationRequest) -> IntArray:
    """Ask twice, and hold the answers against the contract; the answer."""
    about, name = _describe(request), _name(policy)
    answers = []
    for _ in range(2):
        fresh = dataclasses.replace(
            request, **{key: getattr(request, key).copy() for key in _ARRAYS}
        )
        try:
            answers.append(run_policy(policy, fresh, about))
        except PolicyError as error:
            if "read-only" in str(error):
                raise AssertionError(f"policy {name!r} writes to its input: {error}") from error
            raise AssertionError(str(error)) from error
        for key in _ARRAYS:
            if not np.array_equal(getattr(fresh, key), getattr(request, key)):
                raise AssertionError(f"policy {name!r} writes to its input {key!r}: {about}")
    if not np.array_equal(answers[0], answers[1]):
        raise AssertionError(
            f"policy {name!r} is not deterministic: {answers[0].tolist()}, then "
            f"{answers[1].tolist()} for {about}"
        )
    return answers[0]


def _check_permuted(policy: Policy, request: AllocationRequest, permutation: list[int]) -> None:
    order = np.array(permutation)
    growth = _check_once(policy, request)
    renumbered = dataclasses.replace(
        request, **{key: getattr(request, key)[order] for key in _ARRAYS}
    )
    got = _check_once(policy, renumbered)
    if not np.array_equal(got, growth[order]):
        raise AssertionError(
            f"policy {_name(policy)!r} depends on the numbering of the experts: "
            f"{growth.tolist()} for {_describe(request)}, but in the order "
            f"{permutation} it gives {got.tolist()}, not {growth[order].tolist()} "
            "(equivariant=False turns this check off)"
        )


def _name(policy: Policy) -> str:
    return getattr(policy, "__name__", type(policy).__name__)


def _describe(request: AllocationRequest) -> str:
    return (
        f"request quota={request.quota}, ranks={request.ranks.tolist()}, "
        f"limits={request.limits.tolist()}, saliency={request.saliency.round(4).tolist()}"
    )
