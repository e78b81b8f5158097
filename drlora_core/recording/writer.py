"""Recording a run while it goes on."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.locks import FolderLock
from drlora_core.pruning import follow, initial_order, to_recorded
from drlora_core.recording import format as files
from drlora_core.saliency import mask_inactive, mean_over_active

FLUSH_SECONDS = 30.0
"""A step that comes later than this after the last write first writes the steps before it."""
Given = ArrayLike | None
Ranks = Mapping[str, IntArray]


class Recorder(Protocol):
    """Receives the samples and steps of an engine."""

    def sample(self, name: str, routing: Given, importance: Given, tokens: int | None) -> None:
        """Take a layer's sample, which the engine has accepted."""

    def step(self, step: int, ranks: Ranks, event: GrowthEvent | None) -> None:
        """Close an optimizer step; ``ranks`` are those before the event."""

    def flush(self) -> None:
        """Write everything to disk; the engine's state is being saved."""

    def close(self) -> None:
        """Finish; the engine stops recording."""


class RecordedEngine(Protocol):
    """What the writer asks of an ``AllocatorEngine``, whose module imports this one."""

    config: AllocatorConfig

    @property
    def step_count(self) -> int: ...

    @property
    def layer_names(self) -> tuple[str, ...]: ...

    def ranks(self, name: str) -> IntArray: ...

    def settle(self) -> None: ...


class RecordingWriter:
    """Records an engine to a folder; a :class:`Recorder`.

    The first step creates the folder. A resumed engine continues the recording at the path: the
    steps after the engine's last one are discarded. Until it is closed, no other writer can record
    to the folder.

    Args:
        path: a new or empty folder, or the recording to continue.
        engine: the ``AllocatorEngine``.
        policy: name of the policy that decides.
        chunk_steps: most steps of a segment, 1 to 256; steps that need more than 8 MiB together
            always go to several segments (docs/recording.md).

    Raises:
        LayoutError: ``chunk_steps`` is out of range, or the path is a file or lies under one.
    """

    _header: files.Header | None = None  # None: closed, or no step yet
    _opened = False  # in this process
    _at_exit: functools.partial[None] | None = None
    _lock: FolderLock | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        engine: RecordedEngine,
        *,
        policy: str | None = None,
        chunk_steps: int = files.SEGMENT_STEPS,
    ) -> None:
        if not 1 <= chunk_steps <= files.SEGMENT_STEPS:
            raise LayoutError(f"chunk_steps is {chunk_steps}; accepted: 1 to {files.SEGMENT_STEPS}")
        self.path = Path(path)
        files.check_place(self.path)
        self._engine, self._policy, self._chunk_steps = engine, policy, chunk_steps
        self._process = os.getpid()
        self._steps, self._flushed_at = 0, time.monotonic()
        self._rows: list[files.Rows] = []  # steps that are only in memory, and their events
        self._events: list[GrowthEvent] = []
        self._samples: dict[str, tuple[dict[str, FloatArray], float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has to open the recording itself, which it can once this writer is closed."""
        closed = dict.fromkeys(("_lock", "_at_exit", "_header"))
        return {**self.__dict__, **closed, "_rows": [], "_events": [], "_opened": False}

    def sample(self, name: str, routing: Given, importance: Given, tokens: int | None) -> None:
        arrays = {}
        if routing is not None:
            arrays["routing"] = np.array(routing, dtype=np.float64)
        if importance is not None:
            values = np.array(importance, dtype=np.float64)
            ranks = self._engine.ranks(name)
            if values.ndim == 2:
                if self._engine.config.cuts:
                    arrays["dimensions"] = values
                values = mean_over_active(mask_inactive(values, ranks), ranks)
            values[ranks == 0] = 0.0  # whatever was given, even NaN: the engine does not read it
            arrays["importance"] = values
        self._samples[name] = arrays, files.UNKNOWN["i"] if tokens is None else tokens

    def step(self, step: int, ranks: Ranks, event: GrowthEvent | None) -> None:
        """Append a step; it replaces a recorded step of this number and all later ones.

        Raises:
            LayoutError: a gap, or another run's recording at the path, or another writer.
            OSError: the disk refuses; the step is not counted and can be repeated.
        """
        header = self._header
        if header is None or self._steps != step - 1:
            header = self._open(ranks, step - 1)
        full = len(self._rows) >= min(self._chunk_steps, header.segment_steps)
        if full or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()
        self._rows.append(self._make_row(header, ranks))
        self._steps, self._samples = step, {}
        if event is not None:
            self._events.append(event)
            self._follow_cut(event)

    def flush(self) -> None:
        """Write the steps that are only in memory.

        Raises:
            LayoutError: somebody has deleted the recording; it has ended then.
        """
        if self._header is not None and self._rows:
            start, rows = self._steps - len(self._rows), np.concatenate(self._rows)
            with self._there():
                files.write_segment(self.path, start, rows, self._events, self._header)
            self._rows, self._events = [], []
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush, and mark the recording as complete; a later step opens it again."""
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
        if os.getpid() != self._process:
            return  # in a forked child
        if not self._opened:
            self._complete()
        elif self._header is not None:
            try:
                self._engine.settle()  # at the end of the process the last step may be deferred
            finally:
                try:
                    self.flush()
                    with self._there():
                        files.write_header(self.path, self._header, self._steps)
                    self._header = None
                finally:
                    self._unlock()

    def _complete(self) -> None:
        """Mark what an earlier process has recorded as complete, if it ends where the engine is."""
        steps = self._engine.step_count
        if steps and files.ends_at(self.path, steps):
            ranks = {name: self._engine.ranks(name) for name in self._engine.layer_names}
            with contextlib.suppress(LayoutError):  # it is another run's
                self._open(ranks, steps)
                self.close()

    def __del__(self) -> None:
        """An engine that nobody has any more stops recording."""
        if self._opened:
            with contextlib.suppress(OSError, LayoutError):  # nobody is there to be told
                self.close()

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        """Inside, a part of the recording is written, unless its beginning is gone."""
        with contextlib.suppress(FileNotFoundError):
            lost = self._lock is not None and self._lock.is_lost
            if not lost and (self.path / files.FILE).is_file():
                yield
                return
        self._header, self._rows, self._events = None, [], []
        self._unlock()
        raise LayoutError(
            f"the recording {str(self.path)!r} was deleted while it was written; record a new "
            "run, or go on from an earlier state with a copy of it"
        )

    def _take_lock(self) -> None:
        """Keep other writers away, also one that nobody has any more and that was not closed."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = FolderLock(self.path)
        except BlockingIOError:
            gc.collect()
            try:
                self._lock = FolderLock(self.path)
            except BlockingIOError:
                raise LayoutError(
                    f"another engine records to {str(self.path)!r} (this one may be a copy of it); "
                    "end that with engine.record_to(None), wait until its process has ended, or "
                    "use a new path"
                ) from None

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self, ranks: Ranks, steps: int) -> files.Header:
        """Create the recording, or keep its first ``steps`` steps."""
        self.flush()
        self._opened, self._process = True, os.getpid()  # a copy may be in another process
        config, layers = self._engine.config, {name: values.size for name, values in ranks.items()}
        depth = config.r_max if config.cuts else None
        header = files.Header(layers=layers, config=config, policy=self._policy, dimensions=depth)
        events = self._take_up(header, steps)
        self._header, self._steps = header, steps
        self._order = initial_order(sum(layers.values()), depth or 0)
        for event in events:
            self._follow_cut(event)
        self._at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)
        return header

    def _take_up(self, header: files.Header, steps: int) -> list[GrowthEvent]:
        """Keep the first ``steps`` steps of the folder, and return their events."""
        if self._header is not None:
            return files.discard_steps(self.path, header, steps)
        files.check_folder(self.path, header, steps)
        self._take_lock()
        try:
            files.check_folder(self.path, header, steps)  # again: now nobody else writes
            return files.discard_steps(self.path, header, steps)
        except BaseException:
            self._unlock()
            raise

    def _make_row(self, header: files.Header, ranks: Ranks) -> files.Rows:
        rows = header.make_rows(1)
        row = rows[0]
        for position, (name, part) in enumerate(files.split_experts(header.layers).items()):
            row["ranks"][part] = ranks[name]
            if name not in self._samples:
                continue
            arrays, row["tokens"][position] = self._samples[name]
            row["presence"][position] = files.SAMPLED + sum(files.BITS[what] for what in arrays)
            for what, values in arrays.items():
                recorded = values
                if what == "dimensions":
                    recorded = to_recorded(values, ranks[name], self._order[part])
                row[what][part] = recorded
        return rows

    def _follow_cut(self, event: GrowthEvent) -> None:
        if event.cut:
            cut = np.concatenate([event.cut[name] for name in event.ranks])
            self._order = follow(self._order, cut)


def _close(writer: weakref.ref[RecordingWriter]) -> None:
    """Close a writer at the end of the process, if it is still there."""
    if (found := writer()) is not None:
        with contextlib.suppress(LayoutError):  # deleted, by somebody who knows
            found.close()
