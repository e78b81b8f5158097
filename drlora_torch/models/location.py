"""Where a layer keeps the weights of a projection, as the formats of other libraries address it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParameter:
    """One parameter with the weights of all experts."""

    module: str = ""
    """Name, in the layer, of the module that has the parameter; empty for the layer itself."""
    name: str
    """Name of the parameter."""
    transposed: bool
    """True for weights [N, I, O]."""
    interleaved: bool = False
    """Rows of gate and up alternate; else they are halves. Said of fused projections alone."""
    read_from_outside: bool = False
    """The weight is read by another module than ``module``, so no wrapper of it can change it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLinears:
    """One Linear per expert."""

    experts: tuple[str, ...]
    """Name of each expert in the layer, in the order of their indices."""
    projection: str
    """Name of the Linear in each of them."""


Location = ExpertParameter | ExpertLinears
