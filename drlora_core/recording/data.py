"""A recording in memory: NumPy arrays, checked once, and views of them by layer.

Shapes: T steps, L layers, E experts of all layers one after the other, N experts of one layer,
R = r_max rank dimensions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import DRLoRAError, LayoutError, UnknownLayerError, near_misses
from drlora_core.events import GrowthEvent
from drlora_core.recording import checks, folder, segment
from drlora_core.recording import header as headers

ARRAYS = ("routing", "importance", "presence", "tokens", "ranks", "dimensions")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LayerRecord:
    """One layer of a recording; arrays are read-only views."""

    name: str
    routing: FloatArray
    """phi, [T, N]; NaN where no sample of it was taken."""
    importance: FloatArray
    """Mean of s_j over the active dimensions, [T, N]; NaN where no sample of it was taken."""
    dimensions: FloatArray | None
    """s_j, [T, N, R], dimensions numbered as at the start, NaN where cut; policy ``prune`` only."""
    ranks: IntArray | None
    """Ranks that the step's samples were taken at, [T, N]; None if never recorded."""
    tokens: IntArray
    """Counted tokens, [T]; -1 where unknown."""
    presence: NDArray[np.uint8]
    """What each sample held, [T], bits of :mod:`drlora_core.recording.header`."""

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """False where the engine was told to skip the layer, bool [T]."""
        return (self.presence & headers.SAMPLED) > 0

    def routing_at(self, row: int) -> FloatArray | None:
        """phi of one row (step ``row + 1``), or None if it was not given."""
        return self.routing[row] if self.presence[row] & headers.BITS["routing"] else None

    def importance_at(self, row: int) -> FloatArray | None:
        """Mean importance of one row, or None if it was not given."""
        return self.importance[row] if self.presence[row] & headers.BITS["importance"] else None


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """Statistics of a run, as recorded: build one with :meth:`open` or :meth:`from_arrays`.

    Example:
        >>> routing = np.full((3, 4), 0.25)
        >>> recording = Recording.from_arrays({"experts": routing})
        >>> recording.steps, recording.layers
        (3, {'experts': 4})
    """

    layers: dict[str, int]
    """Experts of each layer, in the order of the engine."""
    routing: FloatArray
    importance: FloatArray
    presence: NDArray[np.uint8]
    tokens: IntArray
    ranks: IntArray | None = None
    dimensions: FloatArray | None = None
    events: tuple[GrowthEvent, ...] = ()
    config: AllocatorConfig | None = None
    """Configuration of the run; None for data that comes from elsewhere."""
    policy: str | None = None
    """Name of the policy of the run, which may be a callable in place of ``config.policy``."""
    notes: tuple[str, ...] = ()
    """What the reader found: say, that the writer is still at work or was killed."""
    path: Path | None = None

    def __post_init__(self) -> None:
        arrays = {name: getattr(self, name) for name in ARRAYS}
        checks.check(self.layers, arrays, None if self.config is None else self.config.r_max)
        for array in arrays.values():
            if array is not None:
                array.setflags(write=False)

    @property
    def steps(self) -> int:
        """Optimizer steps recorded, T."""
        return int(self.presence.shape[0])

    @property
    def num_experts(self) -> int:
        """Experts of all layers, E."""
        return sum(self.layers.values())

    def layer(self, name: str) -> LayerRecord:
        """One layer's arrays.

        Raises:
            UnknownLayerError: naming close names.
        """
        if name not in self.layers:
            raise UnknownLayerError(f"no layer {name!r}; {near_misses(str(name), self.layers)}")
        position = list(self.layers).index(name)
        part = self.slices()[name]
        return LayerRecord(
            name=name,
            routing=self.routing[:, part],
            importance=self.importance[:, part],
            dimensions=None if self.dimensions is None else self.dimensions[:, part],
            ranks=None if self.ranks is None else self.ranks[:, part],
            tokens=self.tokens[:, position],
            presence=self.presence[:, position],
        )

    def slices(self) -> dict[str, slice]:
        """Where each layer's experts lie in the arrays over E."""
        return checks.slices(self.layers)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a recording into memory, even while it is being written.

        Raises:
            LayoutError: not a recording, another version, damaged, or with holes.
            OSError: the path cannot be read.
        """
        path = Path(path)
        header = headers.read(path)
        events: list[GrowthEvent] = []
        parts: dict[str, list[NDArray[Any]]] = {
            name: [np.empty((0, *spec.columns), spec.dtype)]
            for name, spec in header.step_arrays.items()
        }
        for arrays, new in folder.read_segments(path, header):
            events += new
            for name, rows in arrays.items():
                parts[name].append(rows)
        fields: dict[str, Any] = {
            name: np.ascontiguousarray(np.concatenate(rows)) for name, rows in parts.items()
        }
        ranks = fields.pop("ranks")
        if ranks.any():  # `save` writes zeros where ranks are unknown
            fields["ranks"] = ranks.astype(np.int64)
        fields |= {"config": header.config, "policy": header.policy, "events": tuple(events)}
        fields["notes"] = _notes(header, len(fields["presence"]))
        try:
            return cls(layers=header.layers, path=path, **fields)
        except DRLoRAError as error:
            raise type(error)(f"recording {path}: {error}") from error

    @classmethod
    def from_arrays(
        cls,
        routing: Mapping[str, ArrayLike] | None,
        importance: Mapping[str, ArrayLike] | None = None,
        *,
        tokens: ArrayLike | None = None,
        ranks: Mapping[str, ArrayLike] | None = None,
        dimensions: Mapping[str, ArrayLike] | None = None,
        config: AllocatorConfig | None = None,
    ) -> Recording:
        """Build a recording from statistics of any origin.

        Args:
            routing: phi by layer, float [T, N]; None if unknown (then replay with
                ``use_routing=False``).
            importance: g's samples by layer, float [T, N]; None if unknown.
            tokens: counted tokens of each step, int [T].
            ranks: ranks at which the samples were taken, int [T, N] by layer.
            dimensions: s_j by layer, float [T, N, R], R equal in all layers, NaN for dimensions
                that were not active; needed to replay policy ``prune``.
            config: configuration of the run that they come from.

        Raises:
            LayoutError: layers, steps or shapes that do not fit together.
            StatisticError: naming layer, step and value of the first impossible number.
        """
        given = {"routing": routing, "importance": importance, "ranks": ranks}
        given["dimensions"] = dimensions
        layers, arrays = checks.join(given, tokens)
        policy = None if config is None else config.policy
        return cls(layers=layers, config=config, policy=policy, **arrays)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording to a new path.

        Raises:
            LayoutError: the path is not empty.
        """
        path = Path(path)
        if path.is_dir() and any(path.iterdir()):
            raise LayoutError(f"{path} is not empty; choose a new path for the recording")
        depth = None if self.dimensions is None else self.dimensions.shape[2]
        header = headers.Header(
            layers=self.layers, config=self.config, policy=self.policy, dimensions=depth
        ).with_segment_steps(None)
        ranks = np.zeros(self.routing.shape) if self.ranks is None else self.ranks
        headers.write(path, header)
        for start in range(0, self.steps, header.segment_steps):
            end = start + header.segment_steps
            rows: segment.Arrays = {
                name: (ranks if name == "ranks" else getattr(self, name))[start:end].astype(dtype)
                for name, (dtype, *_) in header.step_arrays.items()
            }
            events = [event for event in self.events if start < event.step <= end]
            segment.write(folder.segment_path(path, start), rows, events, header)
        headers.write(path, header.with_steps(self.steps))


def _notes(header: headers.Header, steps: int) -> tuple[str, ...]:
    if header.steps is None:
        return (
            f"the recording was not closed: its writer is still at work or was killed; up to "
            f"{header.segment_steps - 1} steps after step {steps} may be missing",
        )
    if header.steps != steps:
        return (f"the recording was closed at step {header.steps}, but has {steps} steps now",)
    return ()
