"""What an adapter measures: named importance and routing signals, and callables of your own.

An importance signal gives a number for each rank slot of a projection; the numbers of an expert's
projections are summed. A routing signal gives what each (token, expert) pair counts, in place of
its routing weight.

Example:
    >>> def squared_weight(weights: Tensor) -> Tensor:
    ...     return weights**2
    >>> choose_routing(squared_weight).measure(torch.tensor([[0.75, 0.25]])).tolist()
    [[0.5625, 0.0625]]

Shape letters: T tokens, K experts per token, P rank slots, I input and O output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from drlora_core.errors import StatisticError, near_misses
from drlora_core.policies import policy_name

OWN = "own:"
"""Prefix of the names that files give to callables of the user's own."""


class ProjectionRows(NamedTuple):
    """The rank slots of one projection, float32 at least; gradients are unscaled.

    A slot is a row of both: a rank dimension of an expert, or free and 0. A process that holds some
    of the slots gets those. A gradient that is absent is 0. They may be the adapter's own tensors:
    do not write to them.
    """

    A: Tensor
    """[P, I]."""
    B: Tensor
    """[P, O]."""
    grad_A: Tensor
    """dL/dA, [P, I]."""
    grad_B: Tensor
    """dL/dB, [P, O]."""


class ImportanceSignal(Protocol):
    """Measures rank slots: a finite number >= 0 for each, floating point [P] on their device.

    A number of a slot depends on its own row alone. With ``adapter.step(grad_scale=...)``, an
    attribute ``degree`` must say how it grows with the gradients: 1 like them, 2 like their
    squares, 0 not at all.

    Example:
        >>> def largest_gradient(rows: ProjectionRows) -> Tensor:
        ...     return rows.grad_A.abs().amax(dim=1) + rows.grad_B.abs().amax(dim=1)
        >>> largest_gradient.degree = 1
    """

    def __call__(self, rows: ProjectionRows) -> Tensor: ...


class RoutingSignal(Protocol):
    """Measures routing weights, float64 [T, K]: a finite number >= 0 for each, of the same shape.

    A row is a token, whose K weights are in no particular order.
    """

    def __call__(self, weights: Tensor) -> Tensor: ...


def sensitivity(rows: ProjectionRows) -> Tensor:
    """mean |A_j dA_j| + mean |B_j dB_j|, as in AdaLoRA (arXiv 2303.10512, eq. 8)."""
    return (rows.A * rows.grad_A).abs().mean(1) + (rows.B * rows.grad_B).abs().mean(1)


def sensitivity_per_token(rows: ProjectionRows) -> Tensor:
    """``sensitivity``, which the step then divides by the expert's phi; 0 where phi is 0.

    The gradients of a mean over tokens grow with the tokens that visit an expert, and so does
    sensitivity; S = f * g counts them twice.
    """
    return sensitivity(rows)


def fisher(rows: ProjectionRows) -> Tensor:
    """mean dA_j^2 + mean dB_j^2: the diagonal of the empirical Fisher information."""
    return rows.grad_A.square().mean(1) + rows.grad_B.square().mean(1)


def gradient(rows: ProjectionRows) -> Tensor:
    """mean |dA_j| + mean |dB_j|; where B is 0, the gradient that a fresh B gets."""
    return rows.grad_A.abs().mean(1) + rows.grad_B.abs().mean(1)


def update_norm(rows: ProjectionRows) -> Tensor:
    """|A_j| |B_j|: the Frobenius norm of what the dimension adds to W, up to its scaling.

    B starts at 0, so this is what the dimension has become since its birth.
    """
    found: Tensor = rows.A.norm(dim=1) * rows.B.norm(dim=1)
    return found


def weight(weights: Tensor) -> Tensor:
    """Count a pair by its routing weight."""
    return weights


def margin(weights: Tensor) -> Tensor:
    """The weight minus the token's smallest selected one: how clearly the router preferred it."""
    if weights.shape[1] < 2:
        raise StatisticError(
            "routing='margin' compares the experts of a token, but this model selects one expert "
            "per token; use routing='weight' or 'count'"
        )
    return weights - weights.amin(dim=1, keepdim=True)


def count(weights: Tensor) -> Tensor:
    """1 for each pair: phi is then the share of the tokens that visit the expert."""
    return torch.ones_like(weights)


IMPORTANCE: Mapping[str, ImportanceSignal] = MappingProxyType(
    {f.__name__: f for f in (sensitivity, sensitivity_per_token, fisher, gradient, update_norm)}
)
ROUTING: Mapping[str, RoutingSignal] = MappingProxyType(
    {f.__name__: f for f in (weight, margin, count)}
)
DEGREES = {"sensitivity": 1, "sensitivity_per_token": 1, "fisher": 2, "gradient": 1}
"""How the built-in signals grow with the gradients; ``update_norm`` does not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Importance:
    """An importance signal that was chosen."""

    name: str
    function: ImportanceSignal | None
    """None for a callable of the user's own that a file only names."""
    own: bool = False
    kind: ClassVar[str] = "importance"

    def __str__(self) -> str:
        return f"{OWN}{self.name}" if self.own else self.name

    @property
    def is_sensitivity(self) -> bool:
        """True where the fast code for whole parameters gives the values."""
        return not self.own and self.name in ("sensitivity", "sensitivity_per_token")

    @property
    def is_per_token(self) -> bool:
        """True where the values are divided by phi once all processes have met."""
        return not self.own and self.name == "sensitivity_per_token"

    @property
    def degree(self) -> int | None:
        """How the values grow with the gradients; None where the user has not said so."""
        return getattr(self.function, "degree", None) if self.own else DEGREES.get(self.name, 0)

    @torch.no_grad()
    def measure(self, rows: ProjectionRows) -> Tensor:
        """The values of the slots, float64 [P]; negative ones, which no host sees yet, as -inf.

        Raises:
            StatisticError: naming a signal that fails, or answers in another shape or dtype.
        """
        if not len(rows.A):  # of a process that holds none of the slots
            return rows.A.new_zeros(0, dtype=torch.float64)
        return _answer(self.kind, self.name, self.function, rows, rows.A[:, 0])


@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    """A routing signal that was chosen."""

    name: str
    function: RoutingSignal | None
    """As in :class:`Importance`."""
    own: bool = False
    kind: ClassVar[str] = "routing"

    def __str__(self) -> str:
        return f"{OWN}{self.name}" if self.own else self.name

    @torch.no_grad()
    def measure(self, weights: Tensor) -> Tensor:
        """What each pair counts, [T, K]; negative values as -inf. Raises as :class:`Importance`."""
        if self.function is weight:
            return weights
        weights = weights.double()
        return _answer(self.kind, self.name, self.function, weights, weights)

    def check(self, weights: Tensor) -> None:
        """Refuse a model in whose forward the signal has no meaning, by its weights [T, K]."""
        if self.function is margin and weights.shape[1] < 2:
            margin(weights)


SENSITIVITY = Importance("sensitivity", sensitivity)
WEIGHT = Routing("weight", weight)


def choose_importance(given: object) -> Importance:
    """Find the importance signal of a name, or take a callable.

    Raises:
        StatisticError: the name is not known (naming near misses), or it is no callable.
    """
    if isinstance(given, Importance):
        return given
    return Importance(*_choose("importance", given, IMPORTANCE))


def choose_routing(given: object) -> Routing:
    """Find the routing signal of a name, or take a callable; raises as :func:`choose_importance`.

    Example:
        >>> choose_routing("count").measure(torch.tensor([[0.75, 0.25]])).tolist()
        [[1.0, 1.0]]
        >>> choose_routing("weigth")
        Traceback (most recent call last):
        drlora_core.errors.StatisticError: no routing signal 'weigth'; did you mean 'weight'?
    """
    if isinstance(given, Routing):
        return given
    return Routing(*_choose("routing", given, ROUTING))


def _choose(kind: str, given: object, known: Mapping[str, Any]) -> tuple[str, Any, bool]:
    if isinstance(given, str):
        if given.startswith(OWN):
            return given.removeprefix(OWN), None, True
        if given not in known:
            raise StatisticError(f"no {kind} signal {given!r}; {near_misses(given, known)}")
        return given, known[given], False
    if not callable(given):
        raise StatisticError(f"{kind} must be a name ({', '.join(known)}) or a callable")
    name = policy_name(given)
    return name, given, known.get(name) is not given


def refuse_named_only(*signals: Importance | Routing) -> None:
    """Refuse signals that a file only names: their code is the user's.

    Raises:
        StatisticError: naming the signal.
    """
    for signal in signals:
        if signal.function is None:
            raise StatisticError(
                f"the {signal.kind} signal {signal.name!r} is a callable of your own, whose code "
                f"is not saved; give it again: {signal.kind}={signal.name}"
            )


def _answer(
    kind: str, name: str, function: Callable[..., Any] | None, given: Any, like: Tensor
) -> Tensor:
    """Call a signal and check what it returns: floating point of the shape of ``like``."""
    where = f"{kind} signal {name!r}"
    if function is None:
        raise StatisticError(f"{where} is not here: its code was not saved with the adapter")
    try:
        values = function(given)
    except StatisticError:
        raise
    except Exception as error:
        raise StatisticError(f"{where} failed: {type(error).__name__}: {error}") from error
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise StatisticError(f"{where} returned {found}; return a floating-point tensor")
    if values.shape != like.shape or values.device != like.device:
        raise StatisticError(
            f"{where} returned shape {list(values.shape)} on {values.device}, not "
            f"{list(like.shape)} on {like.device}"
        )
    # The host finds -inf when the numbers arrive; to look here would wait for the device.
    wide = values.detach().double()
    return torch.where(wide < 0.0, -torch.inf, wide)
