"""Writing a recording while a run goes on.

The writer holds the steps of the running chunk in memory, as arrays of a chunk's size, and writes
them when the chunk is full, at :meth:`RecordingWriter.flush` and at the end of the process.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording import chunks, dimensions, file, schema, store
from drlora_core.recording.data import Recording
from drlora_core.recording.file import RecordingFile
from drlora_core.saliency import mean_over_active

Sample = tuple[FloatArray | None, FloatArray | None, int | None]


class Source(Protocol):
    """What the writer asks of an engine."""

    @property
    def config(self) -> AllocatorConfig:
        """The run's configuration."""
        ...

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Layers in order."""
        ...

    @property
    def step_count(self) -> int:
        """Steps made."""
        ...

    def num_experts(self, name: str) -> int:
        """N of a layer."""
        ...


class RecordingWriter:
    """Writes what an engine tells it (protocol :class:`drlora_core.engine.Recorder`) to a path.

    The store is created at the first sample, when the engine knows its layers. On an engine that
    was resumed, an existing recording of the same run is continued after the engine's last step
    (later steps in it are discarded).

    Args:
        path: where to write; a new or empty directory, or the recording to continue.
        source: the engine.
        policy: name of the policy that decides.
        chunk_steps: steps per chunk; None chooses at most 256, less for very wide models.

    Raises:
        DRLoRAError: zarr is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: Source,
        *,
        policy: str | None = None,
        chunk_steps: int | None = None,
    ) -> None:
        store.import_zarr()
        self.path = Path(path)
        self._source = source
        self._policy = policy
        self._wanted_rows = chunk_steps
        self._file: RecordingFile | None = None
        self._samples: dict[str, Sample] = {}
        self._process = os.getpid()
        atexit.register(self.close)

    def sample(
        self,
        name: str,
        routing: ArrayLike | None,
        importance: ArrayLike | None,
        tokens: int | None,
    ) -> None:
        """Take a copy of a layer's accepted sample; it is written with its step."""
        self._samples[name] = (_copied(routing), _copied(importance), tokens)

    def step(self, step: int, ranks: Mapping[str, IntArray], event: GrowthEvent | None) -> None:
        """Append a step; a step that was written before is replaced, and all after it.

        Raises:
            LayoutError: a gap, or another run's recording at the path.
            OSError: the disk refuses; the step is not counted and can be repeated.
        """
        target = self._opened(step)
        target.seek(step - 1)
        row = target.new_row()
        for position, (name, part) in enumerate(target.slices.items()):
            row["ranks"][part] = ranks[name]
            if name in self._samples:
                order = None if target.order is None else target.order[part]
                _fill(row, position, part, self._samples[name], ranks[name], order)
        target.close_row(event)
        self._samples = {}

    def flush(self) -> None:
        """Write everything that is still in memory."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Flush, and mark the recording as complete; further steps open it again."""
        atexit.unregister(self.close)
        if self._file is not None and os.getpid() == self._process:  # not in a forked child
            self._file.close()
            self._file = None

    def _opened(self, step: int) -> RecordingFile:
        if self._file is None:
            source = self._source
            layers = {name: source.num_experts(name) for name in source.layer_names}
            self._file = self._open(layers, source.config, step - 1)
            atexit.register(self.close)
        return self._file

    def _open(self, layers: dict[str, int], config: AllocatorConfig, steps: int) -> RecordingFile:
        exists = self.path.is_dir() and any(self.path.iterdir())
        if exists and steps:
            return file.resume(self.path, layers, config, steps)
        if steps:
            raise LayoutError(
                f"there is no recording at {self.path} to continue, and the engine is at step "
                f"{steps}; a recording starts before the first step"
            )
        if exists:
            raise LayoutError(
                f"{self.path} is not empty, and the engine is at its start; a recording is only "
                f"continued by a resumed engine: choose a new path"
            )
        depth = config.r_max if config.policy == "prune" else None
        return file.create(
            self.path, layers, config, self._policy, rows=self._wanted_rows, dimensions=depth
        )


def _copied(sample: ArrayLike | None) -> FloatArray | None:
    return None if sample is None else np.array(sample, dtype=np.float64)


def _fill(
    row: file.Row,
    position: int,
    part: slice,
    sample: Sample,
    ranks: IntArray,
    order: IntArray | None,
) -> None:
    """Write a layer's sample into the row; importance by dimension becomes the engine's mean."""
    routing, importance, tokens = sample
    bits = schema.SAMPLED
    if tokens is not None:
        row["tokens"][position] = tokens
    if routing is not None:
        row["routing"][part] = routing
        bits |= schema.ROUTING
    if importance is not None:
        bits |= schema.IMPORTANCE
        if importance.ndim == 2:
            if order is not None:
                row["dimensions"][part] = dimensions.to_recorded(importance, ranks, order)
                bits |= schema.DIMENSIONS
            importance = mean_over_active(importance, ranks)
        row["importance"][part] = importance
    row["presence"][position] = bits


def save(recording: Recording, path: Path) -> None:
    """See :meth:`Recording.save`."""
    depth = None if recording.dimensions is None else recording.dimensions.shape[2]
    target = file.create(
        path, recording.layers, recording.config, recording.policy, dimensions=depth
    )
    ranks = recording.ranks
    arrays: dict[str, NDArray[Any]] = {
        "routing": recording.routing,
        "importance": recording.importance,
        "ranks": np.zeros_like(recording.routing, dtype=np.int32) if ranks is None else ranks,
        "tokens": recording.tokens,
        "presence": recording.presence,
    }
    if recording.dimensions is not None:
        arrays["dimensions"] = recording.dimensions
    target.events = list(recording.events)
    target.flush_events()
    for spec in target.specs:
        values: NDArray[Any] = arrays[spec.name].astype(spec.dtype)
        for number, start in enumerate(range(0, recording.steps, target.rows)):
            chunk: NDArray[Any] = np.full((target.rows, *spec.columns), spec.fill, dtype=spec.dtype)
            piece = values[start : start + target.rows]
            chunk[: piece.shape[0]] = piece
            chunks.write(target.path / spec.name, number, chunk)
        chunks.set_length(target.path / spec.name, recording.steps)
    target.close()
