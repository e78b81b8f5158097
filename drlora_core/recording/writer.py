"""Recording a run while it goes on."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from drlora_core.config import AllocatorConfig
from drlora_core.ema import IntArray
from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording import header as headers
from drlora_core.recording.dimensions import to_recorded
from drlora_core.recording.header import Header
from drlora_core.recording.running import RunningSegment
from drlora_core.recording.segment import Arrays
from drlora_core.saliency import mean_over_active


class Recorder(Protocol):
    """Receives the samples and steps of an engine."""

    def sample(
        self,
        name: str,
        routing: ArrayLike | None,
        importance: ArrayLike | None,
        tokens: int | None,
    ) -> None:
        """Take the sample of a layer, which the engine has accepted."""
        ...

    def step(self, step: int, ranks: Mapping[str, IntArray], event: GrowthEvent | None) -> None:
        """Close an optimizer step; ``ranks`` are those that the samples were taken at."""
        ...

    def flush(self) -> None:
        """Write everything to disk; called when the engine's state is saved."""
        ...

    def close(self) -> None:
        """Finish; called when the engine stops recording."""
        ...


class Source(Protocol):
    """What the writer needs of an engine."""

    @property
    def config(self) -> AllocatorConfig:
        """The run's configuration."""
        ...

    def ranks(self, name: str) -> IntArray:
        """Active ranks of a layer, int64 [N]."""
        ...


class RecordingWriter:
    """Records an engine to a folder; a :class:`Recorder`.

    The folder is made at the first step, when the engine knows its layers. If the engine was
    resumed, the recording at the path is continued after the engine's last step, and its later
    steps are discarded.

    Args:
        path: where to write; a new or empty folder, or the recording to continue.
        source: the engine.
        policy: name of the policy that decides.
        chunk_steps: steps per segment; None chooses at most 256, less for very wide models.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        source: Source,
        *,
        policy: str | None = None,
        chunk_steps: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._source = source
        self._policy = policy
        self._segment_steps = chunk_steps
        self._running: RunningSegment | None = None
        self._samples: dict[str, tuple[Arrays, int]] = {}
        self._process = os.getpid()

    def sample(
        self,
        name: str,
        routing: ArrayLike | None,
        importance: ArrayLike | None,
        tokens: int | None,
    ) -> None:
        """Take a copy of a layer's accepted sample; it is written with its step."""
        given = {"routing": routing, "importance": importance}
        arrays = {
            what: np.array(values, dtype=np.float64)
            for what, values in given.items()
            if values is not None
        }
        if importance is not None and arrays["importance"].ndim == 2:
            if self._source.config.policy == "prune":
                arrays["dimensions"] = arrays["importance"]
            arrays["importance"] = mean_over_active(arrays["importance"], self._source.ranks(name))
        self._samples[name] = arrays, headers.UNKNOWN_TOKENS if tokens is None else tokens

    def step(self, step: int, ranks: Mapping[str, IntArray], event: GrowthEvent | None) -> None:
        """Append a step; a step that was recorded before is replaced, and all after it.

        Raises:
            LayoutError: a gap, or another run's recording at the path.
            OSError: the disk refuses; the step is not counted and can be repeated.
        """
        if self._running is None or self._running.steps != step - 1:
            self.flush()
            self._running = self._open(ranks, step - 1)
            atexit.register(self.close)
        row, start = self._running.new_row(), 0
        for position, (name, layer_ranks) in enumerate(ranks.items()):
            part = slice(start, start + layer_ranks.size)
            start = part.stop
            row["ranks"][part] = layer_ranks
            if name not in self._samples:
                continue
            arrays, row["tokens"][position] = self._samples[name]
            row["presence"][position] = headers.SAMPLED + sum(headers.BITS[what] for what in arrays)
            for what, values in arrays.items():
                row[what][part] = values
            if "dimensions" in arrays:
                order = self._running.order[part]
                row["dimensions"][part] = to_recorded(arrays["dimensions"], layer_ranks, order)
        self._running.append(event)
        self._samples = {}

    def flush(self) -> None:
        """Write everything that is still in memory."""
        if self._running is not None:
            self._running.flush()

    def close(self) -> None:
        """Flush, and mark the recording as complete; further steps open it again."""
        atexit.unregister(self.close)
        if self._running is not None and os.getpid() == self._process:  # not in a forked child
            self._running.close()
            self._running = None

    def _open(self, ranks: Mapping[str, IntArray], steps: int) -> RunningSegment:
        """Create the recording, or open it after ``steps`` steps; later ones are discarded."""
        path, config = self.path, self._source.config
        layers = {name: values.size for name, values in ranks.items()}
        if self._running is not None:
            return RunningSegment(path, self._running.header, steps)
        exists = path.is_dir() and any(path.iterdir())
        if exists and not steps:
            raise LayoutError(
                f"{path} is not empty, and the engine is at its start; a recording is only "
                f"continued by a resumed engine: choose a new path"
            )
        if steps and not exists:
            raise LayoutError(
                f"there is no recording at {path} to continue, and the engine is at step {steps}; "
                f"a recording starts before the first step"
            )
        if exists:
            header = headers.read(path)
        else:
            depth = config.r_max if config.policy == "prune" else None
            header = Header(layers=layers, config=config, policy=self._policy, dimensions=depth)
            header = header.with_segment_steps(self._segment_steps)
        if list(header.layers.items()) != list(layers.items()):
            raise LayoutError(f"the recording {path} is of other layers; record to a new path")
        if header.config != config:
            raise LayoutError(f"the recording {path} is of another configuration; use a new path")
        return RunningSegment(path, header, steps)
