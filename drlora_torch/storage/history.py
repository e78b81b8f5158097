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
    found: dict[str, Tensor] = {}
    for name in events[0].deltas if events else ():
        found[f"{name}{MARK}deltas"] = _stack([event.deltas[name] for event in events])
        found[f"{name}{MARK}saliency"] = _stack([event.saliency[name] for event in events])
        if name in events[0].cut:
            found[f"{name}{MARK}cut"] = _stack([event.cut[name] for event in events])
    return found


def to_json(events: Sequence[GrowthEvent]) -> list[dict[str, int]]:
    """Step, number and unplaced units of each event."""
    return [{"step": e.step, "index": e.index, "unplaced": e.unplaced} for e in events]


def from_saved(
    saved: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor], engine: AllocatorEngine
) -> list[GrowthEvent]:
    """Rebuild the events of a file.

    Args:
        saved: what :func:`to_json` gave.
        tensors: all tensors of the file.
        engine: the restored engine, whose ranks the events must lead to.

    Raises:
        CheckpointError: arrays are missing or ill-shaped, or the events lead to other ranks.
    """
    fields = (
        ("deltas", "saliency", "cut")
        if engine.config.policy == "prune"
        else (
            "deltas",
            "saliency",
        )
    )
    present = {key for key in tensors if MARK in key}
    wanted = {f"{name}{MARK}{field}" for name in engine.layer_names for field in fields}
    if present != (wanted if saved else set()):
        raise CheckpointError("the growth events are incomplete or of other layers")
    arrays = {key: _checked(key, tensors[key], len(saved), engine) for key in present}
    ranks = {
        name: engine.config.starting_rank + np.cumsum(arrays[f"{name}{MARK}deltas"], axis=0)
        for name in (engine.layer_names if saved else ())
    }
    for name, after in ranks.items():
        if (after[-1] != engine.ranks(name)).any():
            raise CheckpointError(f"layer {name!r}: the growth events lead to other ranks")

    def by_layer(field: str, number: int) -> dict[str, NDArray[Any]]:
        return {
            name: arrays[f"{name}{MARK}{field}"][number]
            for name in engine.layer_names
            if f"{name}{MARK}{field}" in arrays
        }

    return [
        GrowthEvent(
            step=int(event["step"]),
            index=int(event["index"]),
            deltas=by_layer("deltas", number),
            ranks={name: after[number] for name, after in ranks.items()},
            saliency=by_layer("saliency", number),
            unplaced=int(event["unplaced"]),
            cut=by_layer("cut", number),
        )
        for number, event in enumerate(saved)
    ]


def _stack(arrays: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _checked(key: str, tensor: Tensor, events: int, engine: AllocatorEngine) -> NDArray[Any]:
    name, _, field = key.partition(MARK)
    shape: tuple[int, ...] = (events, engine.num_experts(name))
    if field == "cut":
        shape = (*shape, engine.config.r_max)
    if tensor.dtype != KINDS[field] or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{key} is {tensor.dtype} {list(tensor.shape)}, not {KINDS[field]} {list(shape)}"
        )
    array: NDArray[Any] = tensor.numpy()
    if field == "saliency" and not np.isfinite(array).all():
        raise CheckpointError(f"{key} holds values that are not finite")
    return array
