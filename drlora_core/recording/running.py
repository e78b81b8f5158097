"""The last segment of a recording in progress: steps in memory, written to disk in one piece."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from drlora_core.events import GrowthEvent
from drlora_core.recording import folder as folders
from drlora_core.recording import header as headers
from drlora_core.recording import segment
from drlora_core.recording.dimensions import follow, initial_order
from drlora_core.recording.header import Header
from drlora_core.recording.segment import Arrays

FLUSH_SECONDS = 30.0
"""A step is written at the latest with the first step after this time."""


class RunningSegment:
    """The last segment of a recording, which is still being filled.

    Args:
        folder: the recording.
        header: its header.
        steps: how many steps to keep; later ones are discarded.

    Raises:
        LayoutError: the recording is shorter, or damaged.
    """

    def __init__(self, folder: Path, header: Header, steps: int) -> None:
        self.folder = folder
        self.header = header
        self._start, kept, events = folders.truncate(folder, header, steps)
        self._count = self._written = steps - self._start
        self._rows: Arrays = {}
        for name, spec in header.step_arrays.items():
            self._rows[name] = np.empty((header.segment_steps, *spec.columns), spec.dtype)
            self._rows[name][: self._count] = kept.get(name, 0)
        self._events = [event for event in events if event.step > self._start]
        self._flushed_at = time.monotonic()
        self.order = initial_order(sum(header.layers.values()), header.dimensions or 0)
        """Number of each rank dimension at the start, int64 [E, R]; R = 0 if none are recorded."""
        self._apply_cuts(events)

    @property
    def steps(self) -> int:
        """Steps recorded, those in memory too."""
        return self._start + self._count

    def new_row(self) -> Arrays:
        """Return the next step's rows to fill; :meth:`append` counts them."""
        row = {name: rows[self._count] for name, rows in self._rows.items()}
        for name, spec in self.header.step_arrays.items():
            row[name][...] = spec.fill
        return row

    def append(self, event: GrowthEvent | None) -> None:
        """Count the next step, with the event after it; write the segment if it is time.

        Raises:
            OSError: the disk refuses; the step does not count.
        """
        new = [] if event is None else [event]
        count, events = self._count + 1, self._events + new
        full = count == self.header.segment_steps
        if full or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self._write(count, events)
        self._count, self._events = count, events
        self._apply_cuts(new)
        if full:
            self._start, self._count, self._written, self._events = self.steps, 0, 0, []

    def flush(self) -> None:
        """Write the steps that are in memory only."""
        if self._count != self._written:
            self._write(self._count, self._events)

    def close(self) -> None:
        """Flush, and mark the recording as complete."""
        self.flush()
        headers.write(self.folder, self.header.with_steps(self.steps))

    def _write(self, count: int, events: list[GrowthEvent]) -> None:
        arrays = {name: rows[:count] for name, rows in self._rows.items()}
        path = folders.segment_path(self.folder, self._start)
        segment.write(path, arrays, events, self.header)
        self._written, self._flushed_at = count, time.monotonic()

    def _apply_cuts(self, events: Iterable[GrowthEvent]) -> None:
        for event in events:
            if event.cut:
                cut = np.concatenate([event.cut[name] for name in self.header.layers])
                self.order = follow(self.order, cut)
