"""The open end of a recording on disk: the running chunk, and going back in it.

Shapes: E experts of all layers one after the other, R rank dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drlora_core.config import AllocatorConfig
from drlora_core.ema import IntArray
from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording import chunks, schema, store
from drlora_core.recording.dimensions import follow, initial_order

Row = dict[str, NDArray[Any]]


class RecordingFile:
    """The store of a recording and the rows of the running chunk.

    Invariants: ``written <= start + count``; the store holds all rows before ``start``; ``buffers``
    holds the rows from ``start`` on.
    """

    def __init__(
        self, path: Path, layers: dict[str, int], rows: int, dimensions: int | None
    ) -> None:
        experts = sum(layers.values())
        ends = np.cumsum(list(layers.values())).tolist()
        self.path = path
        self.layers = layers
        self.slices = {
            name: slice(end - size, end)
            for (name, size), end in zip(layers.items(), ends, strict=True)
        }
        self.rows = rows
        self.specs = schema.step_arrays(len(layers), experts, dimensions)
        self.event_specs = schema.event_arrays(experts, dimensions)
        self.buffers: dict[str, NDArray[Any]] = {
            spec.name: np.full((rows, *spec.columns), spec.fill, spec.dtype) for spec in self.specs
        }
        self.start = self.count = self.written = 0
        self.flushed_at = time.monotonic()
        self.written_events: list[GrowthEvent] = []
        self.events: list[GrowthEvent] = []
        self.dimensions = dimensions
        self.order: IntArray | None = None
        self._reorder()

    def new_row(self) -> Row:
        """Return views of the next row, emptied; it counts after :meth:`close_row`."""
        row = {name: buffer[self.count] for name, buffer in self.buffers.items()}
        for name, values in row.items():
            values[...] = {"presence": 0, "tokens": schema.UNKNOWN_TOKENS, "ranks": 0}.get(
                name, np.nan
            )
        return row

    def close_row(self, event: GrowthEvent | None) -> None:
        """Count the row, with the event that follows it; write the chunk if it is full."""
        self.count += 1
        if event is not None:
            self.events.append(event)
            if event.cut and self.order is not None:
                self.order = follow(self.order, np.concatenate(list(event.cut.values())))
        if self.count == self.rows:
            self.flush()
            self.start, self.count = self.start + self.rows, 0
        elif time.monotonic() - self.flushed_at > schema.FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the running chunk and the events; ``presence`` comes last and commits them."""
        self.flushed_at = time.monotonic()
        end = self.start + self.count
        if end == self.written:
            return
        self.flush_events()
        for spec in self.specs:
            chunk = self.buffers[spec.name]
            chunk[self.count :] = spec.fill
            chunks.write(self.path / spec.name, self.start // self.rows, chunk)
            chunks.set_length(self.path / spec.name, end)
        self.written = end

    def flush_events(self) -> None:
        """Write the events; readers ignore those of steps that are not written."""
        if not self.events:
            return
        start = len(self.written_events)
        for spec in self.event_specs:
            array = self.path / "events" / spec.name
            for row, event in enumerate(self.events, start):
                values: NDArray[Any] = np.array(
                    [self._event_values(event, spec.name)], dtype=spec.dtype
                )
                chunks.write(array, row, values)
            chunks.set_length(array, start + len(self.events))
        self.written_events += self.events
        self.events = []

    def _event_values(self, event: GrowthEvent, name: str) -> Any:
        values = getattr(event, name)
        if isinstance(values, int):
            return values
        return np.concatenate([values[layer] for layer in self.layers])

    def close(self) -> None:
        """Flush, and mark the recording as complete."""
        self.flush()
        chunks.set_attribute(self.path, "closed", True)

    def seek(self, steps: int) -> None:
        """Make ``steps`` the number of steps there are, discarding what follows.

        Raises:
            LayoutError: there are fewer.
        """
        end = self.start + self.count
        if steps > end:
            raise LayoutError(
                f"the recording ends at step {end}, but step {steps + 1} is to be recorded; "
                f"resume from a state saved at step {end} or before, or record to a new path"
            )
        if steps == end:
            return
        if self.written > steps:  # first of all, uncommit
            chunks.set_length(self.path / "presence", steps)
            self.written = steps
        if steps < self.start:
            self.load(steps)
        self.count = steps - self.start
        self.events = [event for event in self.events if event.step <= steps]
        self.written_events = [event for event in self.written_events if event.step <= steps]
        for spec in self.event_specs:
            chunks.set_length(self.path / "events" / spec.name, len(self.written_events))
        self._reorder()

    def load(self, steps: int) -> None:
        """Take the rows of the chunk that step ``steps`` ends in from the store."""
        self.start = steps // self.rows * self.rows
        self.count = steps - self.start
        group, _ = store.open_group(self.path)
        for name, buffer in self.buffers.items():
            buffer[: self.count] = group[name][self.start : steps]

    def _reorder(self) -> None:
        if self.dimensions is None:
            return
        self.order = initial_order(sum(self.layers.values()), self.dimensions)
        for event in self.written_events + self.events:
            self.order = follow(self.order, np.concatenate(list(event.cut.values())))


def create(
    path: Path,
    layers: dict[str, int],
    config: AllocatorConfig | None,
    policy: str | None,
    *,
    rows: int | None = None,
    dimensions: int | None = None,
) -> RecordingFile:
    """Create an empty recording; ``dimensions`` (R) only where they are to be recorded."""
    if path.is_dir() and any(path.iterdir()):
        raise LayoutError(f"{path} is not empty; choose a new path for the recording")
    experts = sum(layers.values())
    specs = schema.step_arrays(len(layers), experts, dimensions)
    rows = rows or schema.chunk_steps(specs)
    saved = None if config is None else config.model_dump(mode="json")
    attributes = schema.attributes(layers, saved, policy, rows)
    store.create(path, attributes, specs, schema.event_arrays(experts, dimensions))
    return RecordingFile(path, layers, rows, dimensions)


def resume(
    path: Path, layers: Mapping[str, int], config: AllocatorConfig, steps: int
) -> RecordingFile:
    """Open a recording to go on after ``steps`` steps; later ones are discarded.

    Raises:
        LayoutError: it is another run's, or too short.
    """
    recording = store.read(path)
    if recording.layers != dict(layers) or list(recording.layers) != list(layers):
        raise LayoutError(f"the recording {path} is of other layers; record to a new path")
    if recording.config != config:
        raise LayoutError(f"the recording {path} is of another configuration; use a new path")
    _, attributes = store.open_group(path)
    dimensions = config.r_max if config.policy == "prune" else None
    file = RecordingFile(path, dict(layers), int(attributes["chunk_steps"]), dimensions)
    file.written_events = list(recording.events)
    file.load(recording.steps)
    file.written = recording.steps
    if steps > recording.steps:
        raise LayoutError(
            f"the recording {path} ends at step {recording.steps}, the engine is at step {steps}; "
            f"resume from an earlier state, or record to a new path from the start"
        )
    file.seek(steps)
    chunks.set_attribute(path, "closed", False)
    return file
