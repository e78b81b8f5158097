"""What discovery finds: plain records of the MoE layers of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from drlora_torch.lora.layers import ProjectionShape


@dataclasses.dataclass(frozen=True, slots=True)
class MoELayer:
    """One experts module of a model, as :func:`drlora_torch.discover` lists it."""

    name: str
    """Qualified name of the experts module, and of the layer in the engine."""
    experts_class: str
    """Class name of the experts module."""
    num_experts: int
    """N; 0 where it cannot be told."""
    projections: Mapping[str, ProjectionShape]
    """Input and output features by the name of the weight, such as ``gate_up_proj``."""
    router: str | None
    """Qualified name of the router module, None where none was found."""
    dtype: str
    """How the expert weights are stored, such as ``float32``, ``nf4``, ``fp8`` or ``mxfp4``."""
    obstacle: str | None = None
    """Why the layer cannot be adapted; None where it can."""
    convention: str = "interface"
    """How the layer stores and calls its experts, which says what adapts it."""
    only_on_request: bool = False
    """True for what ``attach`` adapts only if ``layers`` names it, such as routed attention."""
    nbytes: int = dataclasses.field(default=0, compare=False)
    """Bytes that the expert weights take, with the scales of packed ones."""


def describe_storage(layers: Iterable[MoELayer]) -> str:
    """How experts are stored, in words, and the bytes they take."""
    layers = list(layers)
    if not layers:
        return "no adapted experts"
    kinds = " and ".join(sorted({layer.dtype for layer in layers}))
    return f"experts in {kinds} ({sum(layer.nbytes for layer in layers) / 1e9:.2f} GB)"
