"""The samples of one optimizer step, as the engine takes them.

Shape letters: N experts, P rank slots.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from drlora_core.errors import StatisticError
from drlora_torch.attached import Attached
from drlora_torch.signals import Importance, Routing

Array = NDArray[np.float64]


def observe(
    attached: Attached,
    totals: Mapping[str, NDArray[np.float64]],
    slots: Mapping[str, NDArray[np.float64]],
) -> None:
    """Hand the samples of a step to the engine; a layer that saw no token has none.

    A step without any token, or with a statistic that is not finite, is skipped and counted.
    ``totals`` are the summed routing weights and the number of tokens, [N + 1] by layer; ``slots``
    is the importance, float64 [P] by layer.

    Raises:
        StatisticError: a signal gave a negative number; it is named.
    """
    samples = {
        name: (
            totals[name][:-1] / totals[name][-1],
            layer.lora.table.per_dimension(slots[name]),
        )
        for name, layer in attached.layers.items()
        if totals[name][-1] != 0
    }
    options = attached.options
    for name, (phi, s) in samples.items():
        _refuse_negative(name, options.routing, phi)
        _refuse_negative(name, options.importance, s)
    if options.importance.is_per_token:
        samples = {name: (phi, _per_token(s, phi)) for name, (phi, s) in samples.items()}
    if not samples:
        _skip(attached, "no token was counted: no backward pass reached the adapted experts")
    elif not all(np.isfinite(part).all() for sample in samples.values() for part in sample):
        _skip(attached, "routing or importance is not finite")
        samples = {}
    if any(map(attached.engine.is_observed, attached.layers)):
        return  # closing this step was interrupted before
    attached.engine.observe_all(
        routing={name: phi for name, (phi, _) in samples.items()},
        importance={name: s for name, (_, s) in samples.items()},
        tokens={name: int(totals[name][-1]) for name in samples},
    )


def _per_token(importance: Array, phi: Array) -> Array:
    """Importance [N, R] over phi [N], 0 where phi is 0."""
    shares = np.zeros_like(importance)
    with np.errstate(over="ignore"):  # a statistic that is not finite is skipped
        np.divide(importance, phi[:, None], out=shares, where=phi[:, None] > 0.0)
    return shares


def _refuse_negative(layer: str, signal: Routing | Importance, values: Array) -> None:
    """Signals write -inf for numbers below 0, see :mod:`drlora_torch.signals`."""
    if signal.own and (negative := np.isneginf(values)).any():
        raise StatisticError(
            f"layer {layer!r}: {signal.kind} signal {signal.name!r} gave a negative number for "
            f"expert {np.argwhere(negative)[0][0]}; accepted: finite numbers >= 0"
        )


def _skip(attached: Attached, reason: str) -> None:
    if not attached.skipped_steps:
        warnings.warn(
            f"step {attached.engine.step_count + 1}: {reason}; the step counts for nothing in the "
            "allocation (adapter.skipped_steps counts them)",
            RuntimeWarning,
            stacklevel=2,
        )
    attached.skipped_steps += 1
