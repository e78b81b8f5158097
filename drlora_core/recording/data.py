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

from drlora_core import frames, notebook
from drlora_core.config import AllocatorConfig
from drlora_core.ema import FloatArray, IntArray
from drlora_core.errors import LayoutError, StatisticError, check_layer
from drlora_core.events import GrowthEvent
from drlora_core.recording import format as files
from drlora_core.saliency import importance_at_zero
from drlora_core.state import to_floats

ByLayer = Mapping[str, ArrayLike]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LayerRecord:
    """One layer of a recording; arrays are read-only views."""

    name: str
    routing: FloatArray  # phi, [T, N]; NaN where it was not given
    importance: FloatArray  # mean of s_j over the active dimensions, [T, N]; NaN likewise
    dimensions: FloatArray | None  # s_j, [T, N, R], see drlora_core.pruning; NaN where inactive
    ranks: IntArray | None  # when the samples were taken, [T, N]; None if unknown
    tokens: IntArray  # counted tokens, [T]; -1 where unknown
    presence: NDArray[np.uint8]  # [T]; 0: skipped, else 1 + 2 (routing) + 4 (importance) + 8 (s_j)

    def __repr__(self) -> str:
        steps, experts = self.routing.shape
        name = notebook.shorten(self.name)
        return f"LayerRecord({name!r}, {steps} steps, {notebook.count(experts, 'expert')})"

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """False where the engine skipped the layer, [T]."""
        return self.presence > 0

    def routing_at(self, row: int) -> FloatArray | None:
        """phi of step ``row + 1``, [N], or None if it was not given."""
        return self.routing[row] if self.presence[row] & files.BITS["routing"] else None

    def importance_at(self, row: int) -> FloatArray | None:
        """Likewise the mean importance; its share of f where an expert had no rank to measure."""
        if not self.presence[row] & files.BITS["importance"]:
            return None
        importance: FloatArray = self.importance[row]
        if self.ranks is None or self.ranks[row].all():
            return importance
        known, phi = self.ranks[row] > 0, self.routing_at(row)
        phi = np.ones(known.size) if phi is None else phi  # as with use_routing=False
        share = importance_at_zero(phi, importance, known, [known.size])
        return np.where(known, importance, share)

    def find_impossible(self, least: int, r_max: int) -> dict[str, NDArray[np.bool_]]:
        """Find the values of each array that no run can have."""
        found = {"tokens": self.tokens < files.UNKNOWN["i"]}
        for name in ("routing", "importance"):
            values, given = getattr(self, name), (self.presence & files.BITS[name]) > 0
            found[name] = given[:, None] & ~((values >= 0.0) & (values < np.inf))
        if self.ranks is not None:
            found["ranks"] = (self.ranks < least) | (self.ranks > r_max)
        if self.dimensions is not None:
            found["dimensions"] = (self.dimensions < 0.0) | np.isinf(self.dimensions)
        return found


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
    """Configuration of the run; None for data from elsewhere."""
    policy: str | None = None
    """Name of the policy of the run, which may be a callable in place of ``config.policy``."""
    notes: tuple[str, ...] = ()
    """Findings of the reader: say, that the writer still works or was killed."""
    path: Path | None = None

    def __post_init__(self) -> None:
        config = self.config
        bounds = (config.least_rank, config.r_max) if config else (0, 2**31 - 1)
        for layer in map(self.layer, self.layers):
            for name, wrong in layer.find_impossible(*bounds).items():
                if wrong.any():
                    row, *index = (int(number) for number in np.argwhere(wrong)[0])
                    value = getattr(layer, name)[(row, *index)]
                    raise StatisticError(
                        f"layer {layer.name!r}, step {row + 1}: {name}{index or ''} is {value}, "
                        f"which no run records" + (f" (recording {self.path})" if self.path else "")
                    )
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    def __repr__(self) -> str:
        path = f", path={str(self.path)!r}" if self.path else ""
        return f"Recording({self._describe()}{path})"

    def _repr_html_(self) -> str:
        sampled = np.count_nonzero(self.presence, axis=0).tolist()
        rows = zip(self.layers, self.layers.values(), sampled, strict=True)
        columns = ("layer", "experts", "sampled steps")
        return notebook.html_table(f"Recording: {self._describe()}", columns, rows)

    def _describe(self) -> str:
        parts = {"step": self.steps, "layer": len(self.layers), "expert": self.num_experts}
        counts = [notebook.count(number, noun) for noun, number in parts.items()]
        counts.append(notebook.count(len(self.events), "event"))
        return ", ".join(counts + [f"policy {self.policy}"] * (self.policy is not None))

    def events_frame(self) -> Any:
        """Return a pandas DataFrame of the events: :func:`drlora_core.frames.events_frame`."""
        return frames.events_frame(self.events)

    @property
    def steps(self) -> int:
        """Optimizer steps recorded, T."""
        return len(self.presence)

    @property
    def num_experts(self) -> int:
        """Experts of all layers, E."""
        return sum(self.layers.values())

    @property
    def starting_ranks(self) -> dict[str, IntArray] | None:
        """Ranks [N] by layer before the first step; None where they are not known."""
        if self.ranks is None or not self.steps:
            return None
        return {
            name: self.ranks[0, part] for name, part in files.split_experts(self.layers).items()
        }

    def layer(self, name: str) -> LayerRecord:
        """One layer's arrays.

        Raises:
            UnknownLayerError: naming close names.
        """
        check_layer(name, self.layers)
        part, position = files.split_experts(self.layers)[name], list(self.layers).index(name)
        return LayerRecord(
            name=name,
            routing=self.routing[:, part],
            importance=self.importance[:, part],
            dimensions=None if self.dimensions is None else self.dimensions[:, part],
            ranks=None if self.ranks is None else self.ranks[:, part],
            tokens=self.tokens[:, position],
            presence=self.presence[:, position],
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a recording into memory, even while it is written.

        Raises:
            LayoutError: not a recording, another version, damaged, or with missing steps.
            StatisticError: naming layer, step and value of an impossible number.
            OSError: the path cannot be read.
        """
        path = Path(path)
        header = files.read_header(path)
        segments = list(files.read_segments(path, header))
        parts = [header.make_rows(0), *(rows for rows, _ in segments)]
        names = header.step_type.names or ()
        arrays: dict[str, Any] = {name: np.concatenate([p[name] for p in parts]) for name in names}
        ranks, steps = arrays.pop("ranks").astype(np.int64), len(arrays["presence"])
        note = f"the recording was closed at step {header.steps}; it has {steps} steps"
        if header.steps is None:
            note = (
                f"the recording was not closed: its writer still works or was killed; steps after "
                f"step {steps} may be missing"
            )
        return cls(
            layers=header.layers,
            ranks=None if (ranks == files.UNKNOWN["i"]).all() else ranks,
            events=tuple(event for _, events in segments for event in events),
            config=header.config,
            policy=header.policy,
            notes=() if header.steps == steps else (note,),
            path=path,
            **arrays,
        )

    @classmethod
    def from_arrays(
        cls,
        routing: ByLayer | None,
        importance: ByLayer | None = None,
        *,
        tokens: ArrayLike | None = None,
        ranks: ByLayer | None = None,
        dimensions: ByLayer | None = None,
        config: AllocatorConfig | None = None,
    ) -> Recording:
        """Build a recording from statistics of any origin.

        Args:
            routing: phi by layer, float [T, N]; if None, replay with ``use_routing=False``.
            importance: g's samples by layer, float [T, N]; likewise.
            tokens: counted tokens of each step, int [T].
            ranks: ranks when the samples were taken, int [T, N] by layer.
            dimensions: s_j by layer, float [T, N, R], NaN where inactive; for the policies
                ``prune`` and ``move``.
            config: configuration of the run.

        Raises:
            LayoutError: layers, steps or shapes that do not fit together.
            StatisticError: naming layer, step and value of an impossible number.
        """
        given = {"routing": routing, "importance": importance, "ranks": ranks}
        layers, arrays = _join_layers(given | {"dimensions": dimensions})
        steps = len(next(iter(arrays.values())))
        counts = np.full(steps, files.UNKNOWN["i"]) if tokens is None else np.asarray(tokens)
        if counts.shape != (steps,) or counts.dtype.kind not in "iu":
            raise LayoutError(f"tokens must be whole numbers, one for each of {steps} steps")
        bits = files.SAMPLED + sum(bit for name, bit in files.BITS.items() if name in arrays)
        unknown = np.full((steps, sum(layers.values())), np.nan)
        return cls(
            layers=layers,
            config=config,
            policy=None if config is None else config.policy,
            presence=np.full((steps, len(layers)), bits, dtype=np.uint8),
            tokens=np.repeat(counts.astype(np.int64)[:, None], len(layers), axis=1),
            **({"routing": unknown, "importance": unknown} | arrays),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording to a new path.

        Raises:
            LayoutError: the path is not empty.
        """
        path = Path(path)
        if path.is_dir() and any(path.iterdir()):
            raise LayoutError(f"{path} is not empty; choose a new path for the recording")
        depth = None if self.dimensions is None else self.dimensions.shape[2]
        header = files.Header(
            layers=self.layers, config=self.config, policy=self.policy, dimensions=depth
        )
        path.mkdir(parents=True, exist_ok=True)
        files.write_header(path, header, None)
        for start in range(0, self.steps, header.segment_steps):
            end = min(start + header.segment_steps, self.steps)
            rows = header.make_rows(end - start)
            for name in rows.dtype.names or ():
                if (array := getattr(self, name)) is not None:
                    rows[name] = array[start:end]
            events = [event for event in self.events if start < event.step <= end]
            files.write_segment(path, start, rows, events, header)
        files.write_header(path, header, self.steps)


def _join_layers(
    given: dict[str, ByLayer | None],
) -> tuple[dict[str, int], dict[str, NDArray[Any]]]:
    """Return the experts of each layer, and the given arrays over all experts."""
    shapes: dict[str, tuple[int, ...]] = {}
    joined = {}
    for name, by_layer in given.items():
        if not by_layer:
            continue
        parts = {layer: _to_array(name, layer, values) for layer, values in by_layer.items()}
        first = next(iter(parts.values()))
        shapes = shapes or {layer: (len(first), part.shape[1]) for layer, part in parts.items()}
        if list(parts) != list(shapes):
            raise LayoutError(f"{name} must have the layers {list(shapes)[:3]}, in the same order")
        for layer, part in parts.items():
            if part.shape != (wanted := shapes[layer] + first.shape[2:]):
                raise LayoutError(f"layer {layer!r}: {name} has shape {part.shape}, not {wanted}")
        joined[name] = np.concatenate(list(parts.values()), axis=1)
    if not joined:
        raise LayoutError("give routing or importance of at least one layer, {name: [T, N]}")
    return {layer: experts for layer, (_, experts) in shapes.items()}, joined


def _to_array(name: str, layer: str, values: ArrayLike) -> NDArray[Any]:
    array = to_floats(f"layer {layer!r}: {name}", values).copy()
    accepted = "[steps, experts, r_max]" if name == "dimensions" else "[steps, experts]"
    if array.ndim != accepted.count(",") + 1 or 0 in array.shape:
        raise LayoutError(f"layer {layer!r}: {name} has shape {array.shape}; accepted: {accepted}")
    if name == "ranks" and (array % 1.0 != 0.0).any():
        raise StatisticError(f"layer {layer!r}: ranks are not whole numbers")
    return array.astype(np.int64) if name == "ranks" else array
