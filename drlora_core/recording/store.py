"""Creating and reading the Zarr store of a recording.

A step counts as written when the length of ``presence`` says so, which is written last. Files are
replaced atomically (a temporary file and a rename), so a killed writer leaves whole ones behind.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from drlora_core.config import AllocatorConfig
from drlora_core.errors import DRLoRAError, LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording import chunks, schema
from drlora_core.recording.data import Recording
from drlora_core.recording.schema import ArraySpec


def import_zarr() -> Any:
    """Import zarr, or say in one sentence how to get it."""
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise DRLoRAError(
            'recordings need the zarr library: pip install "drlora[record]"'
        ) from error
    return zarr


def create(
    path: Path, attributes: dict[str, Any], steps: list[ArraySpec], events: list[ArraySpec]
) -> None:
    """Create an empty store; the root's attributes are written last and make it a recording."""
    zarr = import_zarr()
    group = zarr.create_group(store=str(path), zarr_format=3)
    rows = attributes["chunk_steps"]
    for prefix, arrays, chunk in (("", steps, rows), ("events/", events, 1)):
        if prefix:
            group.create_group(prefix.rstrip("/"))
        for spec in arrays:
            group.create_array(
                prefix + spec.name,
                shape=(0, *spec.columns),
                chunks=(chunk, *spec.columns),
                dtype=spec.dtype,
                fill_value=spec.fill,
                compressors=chunks.codecs(spec.dtype),
            )
    group.attrs.update(attributes)


def open_group(path: Path) -> tuple[Any, dict[str, Any]]:
    """Open a store and check that it is a recording of our version.

    Returns:
        The Zarr group and its attributes.

    Raises:
        LayoutError: something else, or damaged metadata.
        FileNotFoundError: there is nothing at the path.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no recording at {path}")
    zarr = import_zarr()
    try:
        group = zarr.open_group(str(path), mode="r", zarr_format=3)
        attributes = dict(group.attrs)
    except Exception as error:  # zarr raises ValueError, KeyError, JSONDecodeError, its own
        raise LayoutError(
            f"{path} is not a recording, or its zarr.json is damaged: {_first_line(error)}"
        ) from error
    if attributes.get("format") != schema.FORMAT:
        raise LayoutError(f"{path} is a Zarr group, but not a recording of drlora")
    if attributes.get("version") != schema.VERSION:
        raise LayoutError(
            f"the recording {path} has version {attributes.get('version')!r}; "
            f"this drlora reads {schema.VERSION}"
        )
    return group, attributes


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What the attributes of a recording say."""

    layers: dict[str, int]
    config: AllocatorConfig | None
    policy: str | None
    chunk_steps: int
    closed: bool

    @property
    def dimensions(self) -> int | None:
        """R, where rank dimensions are recorded (policy ``prune``)."""
        if self.config is None or self.config.policy != "prune":
            return None
        return self.config.r_max


def parse(path: Path, attributes: dict[str, Any]) -> Layout:
    """Check the attributes of a recording.

    Raises:
        LayoutError: naming what is missing or impossible.
    """
    try:
        layers = {str(entry["name"]): int(entry["experts"]) for entry in attributes["layers"]}
        saved = attributes["config"]
        config = None if saved is None else AllocatorConfig.model_validate(saved)
        rows = int(attributes["chunk_steps"])
        policy, closed = attributes["policy"], bool(attributes["closed"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise LayoutError(f"the attributes of {path} are damaged: {_first_line(error)}") from error
    if rows < 1 or not layers or min(layers.values()) < 1:
        raise LayoutError(f"the attributes of {path} are damaged: layers {layers}, chunk {rows}")
    return Layout(layers, config, policy, rows, closed)


def read(path: Path) -> Recording:
    """See :meth:`Recording.open`."""
    group, attributes = open_group(path)
    layout = parse(path, attributes)
    experts, dimensions = sum(layout.layers.values()), layout.dimensions
    if dimensions is None and "dimensions" in group:
        dimensions = int(group["dimensions"].shape[2])
    specs = schema.step_arrays(len(layout.layers), experts, dimensions)
    arrays, notes = _read_steps(path, group, specs, layout.chunk_steps)
    steps = arrays["presence"].shape[0]
    event_specs = schema.event_arrays(experts, dimensions)
    events = _read_events(path, group, event_specs, layout.layers, steps)
    if not layout.closed:
        notes.append(
            f"the recording was not closed: its writer is still at work or was killed; up to "
            f"{layout.chunk_steps - 1} steps after step {steps} may be missing"
        )
    known = arrays["ranks"].any()  # Recording.save writes zeros where ranks are unknown
    try:
        return Recording(
            layers=layout.layers,
            routing=arrays["routing"],
            importance=arrays["importance"],
            presence=arrays["presence"],
            tokens=arrays["tokens"],
            ranks=arrays["ranks"].astype(np.int64) if known else None,
            dimensions=arrays.get("dimensions"),
            events=events,
            config=layout.config,
            policy=layout.policy,
            notes=tuple(notes),
            path=path,
        )
    except DRLoRAError as error:
        raise type(error)(f"recording {path}: {error}") from error


def _read_steps(
    path: Path, group: Any, specs: list[ArraySpec], rows: int
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Read all committed steps; a damaged last chunk shortens the recording and is noted."""
    committing_first = reversed(specs)  # what is appended meanwhile is then not looked for
    handles = {spec.name: _handle(path, group, spec.name, spec) for spec in committing_first}
    notes: list[str] = []
    presence, committed = _committed(path, handles["presence"], rows, notes)
    longest = max(handle.shape[0] for handle in handles.values())
    if longest > committed and not notes:
        notes.append(f"steps after {committed} were being written; they are left out")
    last = (committed - 1) // rows * rows if committed else 0
    arrays, steps = {"presence": presence}, committed
    for name, handle in handles.items():
        if name == "presence":
            continue
        body = _rows(path, name, handle, 0, last)
        try:
            tail = _rows(path, name, handle, last, committed)
        except LayoutError as error:
            notes.append(f"steps {last + 1} to {committed} are lost: {error}")
            tail, steps = body[:0], last
        arrays[name] = np.concatenate([body, tail])
    return {name: array[:steps] for name, array in arrays.items()}, notes


def _committed(
    path: Path, handle: Any, rows: int, notes: list[str]
) -> tuple[NDArray[np.uint8], int]:
    """Return ``presence`` of the steps written, and their number; refuse holes between them."""
    last = max(0, (handle.shape[0] - 1) // rows * rows)
    body = _rows(path, "presence", handle, 0, last)
    try:
        body = np.concatenate([body, _rows(path, "presence", handle, last, handle.shape[0])])
    except LayoutError as error:
        notes.append(f"the steps after {last} are lost: {error}")
    written = (body != schema.HOLE).all(axis=1)
    committed = int(written.nonzero()[0][-1]) + 1 if written.any() else 0
    if not written[:committed].all():
        raise LayoutError(
            f"the recording {path} has a hole: step {int(np.argmin(written)) + 1} is missing, "
            f"step {committed} is there"
        )
    return body[:committed], committed


def _rows(path: Path, name: str, handle: Any, start: int, stop: int) -> NDArray[Any]:
    try:
        array = np.asarray(handle[start:stop])
    except Exception as error:  # every codec of zarr has exceptions of its own
        raise LayoutError(
            f"{name} of the recording {path} is damaged between steps {start + 1} and {stop}: "
            f"{_first_line(error)}"
        ) from error
    if array.shape[0] != stop - start:
        raise LayoutError(
            f"{name} of the recording {path} ends at step {start + array.shape[0]}, not {stop}"
        )
    return array


def _handle(path: Path, group: Any, name: str, spec: ArraySpec) -> Any:
    try:
        handle = group[name]
        shape, dtype = handle.shape, handle.dtype
    except Exception as error:
        raise LayoutError(
            f"the recording {path} has no readable array {name!r}: {_first_line(error)}"
        ) from error
    if shape[1:] != spec.columns or dtype != spec.dtype:
        raise LayoutError(
            f"{name} of the recording {path} is {dtype}{list(shape)}, not "
            f"{np.dtype(spec.dtype)}[steps{''.join(f', {size}' for size in spec.columns)}]"
        )
    return handle


def _read_events(
    path: Path, group: Any, specs: list[ArraySpec], layers: dict[str, int], steps: int
) -> tuple[GrowthEvent, ...]:
    """Read the events up to the last committed step."""
    handles = {spec.name: _handle(path, group, f"events/{spec.name}", spec) for spec in specs}
    count = min(handle.shape[0] for handle in handles.values())
    try:
        arrays = {name: np.asarray(handle[:count]) for name, handle in handles.items()}
    except Exception as error:
        raise LayoutError(f"events of {path} are damaged: {_first_line(error)}") from error
    chosen = np.flatnonzero(arrays["step"] <= steps)
    if (arrays["step"][chosen] < 1).any() or (np.diff(arrays["step"][chosen]) < 1).any():
        raise LayoutError(f"events of {path} have holes: steps {arrays['step'].tolist()}")
    return tuple(_event(arrays, int(row), layers) for row in chosen)


def _event(arrays: dict[str, NDArray[Any]], row: int, layers: dict[str, int]) -> GrowthEvent:
    ends = np.cumsum(list(layers.values()))[:-1]

    def by_layer(name: str, dtype: type) -> dict[str, NDArray[Any]]:
        parts = np.split(arrays[name][row].astype(dtype), ends)
        return dict(zip(layers, parts, strict=True))

    return GrowthEvent(
        step=int(arrays["step"][row]),
        index=int(arrays["index"][row]),
        deltas=by_layer("deltas", np.int64),
        ranks=by_layer("ranks", np.int64),
        saliency=by_layer("saliency", np.float64),
        unplaced=int(arrays["unplaced"][row]),
        cut=by_layer("cut", np.bool_) if "cut" in arrays else {},
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
