"""The growth events of a run, as the tensors and JSON values of an adapter file.

``{layer}/events/deltas`` int64 [K, N] and ``saliency`` float64 [K, N]; with policy ``prune`` also
``cut`` bool [K, N, R]. Ranks follow from the deltas.

Shape letters: K events so far, N experts, R = r_max rank dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drlora_core import AllocatorEngine, GrowthEvent
from drlora_torch.errors import CheckpointError

MARK = "/events/"
KINDS = {"deltas": torch.int64, "saliency": torch.float64, "cut": torch.bool}


def to_tensors(events: Sequence[GrowthEvent]) -> dict[str, Tensor]:
    """The arrays of all events, stacked by layer; nothing without events."""
    return {
        f"{name}{MARK}{field}": torch.from_numpy(
            np.stack([getattr(e, field)[name] for e in events])
        )
        for field in KINDS
        for name in (getattr(events[0], field) if events else ())
    }


def to_json(events: Sequence[GrowthEvent]) -> list[dict[str, int]]:
    return [{"step": e.step, "index": e.index, "unplaced": e.unplaced} for e in events]


def wanted_tensors(
    num_events: int, engine: AllocatorEngine
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a file with so many events must hold for them."""
    prune = engine.config.policy == "prune"
    return {
        f"{name}{MARK}{field}": (
            (num_events, engine.num_experts(name)) + (engine.config.r_max,) * (field == "cut"),
            dtype,
        )
        for name in (engine.layer_names if num_events else ())
        for field, dtype in KINDS.items()
        if prune or field != "cut"
    }


def from_saved(
    saved: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], engine: AllocatorEngine
) -> list[GrowthEvent]:
    """Rebuild the events of a file; they must lead to the ranks of its engine."""
    arrays: dict[str, dict[str, NDArray[Any]]] = {field: {} for field in (*KINDS, "ranks")}
    for key in wanted_tensors(len(saved), engine):
        name, _, field = key.partition(MARK)
        arrays[field][name] = tensors[key].numpy()
    for name, deltas in arrays["deltas"].items():
        ranks = engine.config.starting_rank + np.cumsum(deltas, axis=0)
        if (ranks[-1] != engine.ranks(name)).any():
            raise CheckpointError(f"layer {name!r}: the growth events lead to other ranks")
        arrays["ranks"][name] = ranks
    return [
        GrowthEvent(
            step=int(event["step"]),
            index=int(event["index"]),
            unplaced=int(event["unplaced"]),
            **{field: {name: a[k] for name, a in of.items()} for field, of in arrays.items()},
        )
        for k, event in enumerate(saved)
    ]
