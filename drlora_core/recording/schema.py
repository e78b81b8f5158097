"""Names, types and fill values of the arrays of a recording (docs/recording.md, version 1).

Shapes: T steps, L layers, E experts of all layers one after the other, R = r_max rank dimensions,
K events. Every fill value is one that cannot be written, so that a missing chunk is seen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

FORMAT = "drlora-recording"
VERSION = 1

SAMPLED, ROUTING, IMPORTANCE, DIMENSIONS = 1, 2, 4, 8
"""Bits of ``presence``: what a layer's sample of a step held; 0 is a skipped layer."""
HOLE = 255
"""Value of ``presence`` where no step was written."""
UNKNOWN_TOKENS = -1
CHUNK_BYTES = 4 * 2**20
"""Size of a chunk of float64 before compression, which bounds the writer's memory."""
CHUNK_STEPS = 256
FLUSH_SECONDS = 30.0
"""Longest time that a step stays in memory only, if steps go on."""


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySpec:
    """One Zarr array: ``columns`` are its dimensions after the first (step or event)."""

    name: str
    columns: tuple[int, ...]
    dtype: type
    fill: float | int


def step_arrays(num_layers: int, num_experts: int, dimensions: int | None) -> list[ArraySpec]:
    """Arrays with a row per step, in the order of writing: ``presence`` comes last and commits.

    ``dimensions`` is R for policy ``prune``, else None.
    """
    arrays = [
        ArraySpec("routing", (num_experts,), np.float64, np.nan),
        ArraySpec("importance", (num_experts,), np.float64, np.nan),
        ArraySpec("ranks", (num_experts,), np.int32, 0),
        ArraySpec("tokens", (num_layers,), np.int64, -2),
    ]
    if dimensions is not None:
        arrays.append(ArraySpec("dimensions", (num_experts, dimensions), np.float64, np.nan))
    return [*arrays, ArraySpec("presence", (num_layers,), np.uint8, HOLE)]


def event_arrays(num_experts: int, dimensions: int | None) -> list[ArraySpec]:
    """Arrays with a row per growth event, in the order of writing."""
    arrays = [
        ArraySpec("index", (), np.int64, 0),
        ArraySpec("unplaced", (), np.int64, -1),
        ArraySpec("deltas", (num_experts,), np.int32, np.iinfo(np.int32).min),
        ArraySpec("ranks", (num_experts,), np.int32, 0),
        ArraySpec("saliency", (num_experts,), np.float64, np.nan),
    ]
    if dimensions is not None:
        arrays.append(ArraySpec("cut", (num_experts, dimensions), np.uint8, HOLE))
    return [*arrays, ArraySpec("step", (), np.int64, 0)]


def chunk_steps(arrays: list[ArraySpec]) -> int:
    """Steps per chunk, so that the widest array's chunk stays within CHUNK_BYTES."""
    widest = max(int(np.prod(array.columns)) * np.dtype(array.dtype).itemsize for array in arrays)
    return max(1, min(CHUNK_STEPS, CHUNK_BYTES // widest))


def attributes(
    layers: dict[str, int], config: dict[str, Any] | None, policy: str | None, rows: int
) -> dict[str, Any]:
    """Attributes of the root group."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "layers": [{"name": name, "experts": size} for name, size in layers.items()],
        "config": config,
        "policy": policy,
        "chunk_steps": rows,
        "closed": False,
    }
