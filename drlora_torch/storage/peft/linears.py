"""PEFT's LoRA of one Linear per expert (``target_modules``), in which every expert keeps its rank.

A configuration has one rank and one alpha, and regular expressions for the modules that differ:
one for each rank that occurs. (PEFT tries every pattern for every module, so that a pattern for
each expert would cost the square of their number.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from drlora_torch.models.location import ExpertLinears


class Group(NamedTuple):
    """The Linears of some experts of a layer."""

    layer: str
    experts: tuple[str, ...]
    projections: tuple[str, ...]


def groups(layer: str, linears: Sequence[ExpertLinears], ranks: Sequence[int]) -> dict[int, Group]:
    """Experts of a layer by their rank."""
    projections = tuple(each.projection for each in linears)
    by_rank: dict[int, list[str]] = {}
    for expert, rank in zip(linears[0].experts, ranks, strict=True):
        by_rank.setdefault(rank, []).append(expert)
    return {rank: Group(layer, tuple(each), projections) for rank, each in by_rank.items()}


def pattern(chosen: Iterable[Group]) -> str:
    r"""Regular expression of the names of Linears, to match in full.

    Example:
        >>> pattern([Group("layers.0", ("experts.0",), ("w1", "w2")),
        ...          Group("layers.1", ("experts.0",), ("w1", "w2"))])
        '(?:layers\\.0|layers\\.1)\\.(?:experts\\.0)\\.(?:w1|w2)'
    """
    layers: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for layer, experts, projections in chosen:
        layers.setdefault((experts, projections), []).append(layer)
    return "|".join(
        r"\.".join(_any_of(names) for names in (own, experts, projections) if any(names))
        for (experts, projections), own in layers.items()
    )


def by_rank(layers: Iterable[Mapping[int, Group]]) -> dict[int, list[Group]]:
    """Groups of all layers by rank."""
    found: dict[int, list[Group]] = {}
    for layer in layers:
        for rank, group in layer.items():
            found.setdefault(rank, []).append(group)
    return found


def _any_of(names: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"
