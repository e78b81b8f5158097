"""One segment of a recording: an ``.npz`` file with some steps, and the events after them.

Shapes: K events of the segment.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drlora_core import atomic
from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording.header import ArraySpec, Header

Arrays = dict[str, NDArray[Any]]
NPY_HEADER_BYTES = 1024
"""More than NumPy writes before the values of an array."""


def write(path: Path, arrays: Arrays, events: Sequence[GrowthEvent], header: Header) -> None:
    """Write or replace a segment; ``numpy.load`` reads it.

    Integers hardly change from step to step and are compressed along the steps. Floats are stored:
    they hardly compress, and trying takes longer than the rest of a recording.
    """
    content = arrays | _stacked(events, header)

    def fill(part: Path) -> None:
        with zipfile.ZipFile(part, "w", compresslevel=1) as archive:
            for name, array in content.items():
                floats = array.dtype.kind == "f"
                member, method = (
                    io.BytesIO(),
                    zipfile.ZIP_STORED if floats else zipfile.ZIP_DEFLATED,
                )
                ordered = array if floats else np.asfortranarray(array)
                np.lib.format.write_array(member, ordered, allow_pickle=False)
                archive.writestr(f"{name}.npy", member.getbuffer(), method)

    atomic.write_file(path, fill)


def read(path: Path, header: Header, start: int) -> tuple[Arrays, list[GrowthEvent]]:
    """Read the segment after ``start`` steps; no more is read than the header allows.

    Raises:
        LayoutError: damaged, or not a segment of this recording.
        OSError: the file cannot be opened.
    """
    specs = header.step_arrays | header.event_arrays
    with path.open("rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                if (names := sorted(archive.namelist())) != sorted(f"{name}.npy" for name in specs):
                    raise LayoutError(f"it holds {names[:9]}, not the arrays of its header")
                arrays = {
                    name: _read_member(archive, f"{name}.npy", spec, header.segment_steps)
                    for name, spec in specs.items()
                }
        except LayoutError:
            raise
        except Exception as error:  # BadZipFile, zlib.error, EOFError, RuntimeError, MemoryError...
            raise LayoutError(f"{type(error).__name__}: {error}") from error
    steps = {name: arrays.pop(name) for name in header.step_arrays}
    for kind in (steps, arrays):
        if len({len(array) for array in kind.values()}) > 1:
            raise LayoutError("its arrays have different lengths")
    rows, at = len(steps["presence"]), arrays["event_step"]
    if not 1 <= rows <= header.segment_steps:
        raise LayoutError(f"it has {rows} steps; accepted: 1 to {header.segment_steps}")
    if ((at <= start) | (at > start + rows)).any() or (np.diff(at) < 1).any():
        raise LayoutError(f"it has events after steps {at.tolist()}, which are not its own")
    return steps, _unstacked(arrays, header)


def _read_member(archive: zipfile.ZipFile, name: str, spec: ArraySpec, rows: int) -> NDArray[Any]:
    info, most = archive.getinfo(name), rows * spec.row_bytes + NPY_HEADER_BYTES
    if info.file_size > most:
        raise LayoutError(f"{name} has {info.file_size} bytes; accepted: at most {most}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise LayoutError(f"{name} is compressed by another method than deflate")
    with archive.open(info) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):
            raise LayoutError(f"{name} goes on after its array")
    if array.dtype != spec.dtype or array.ndim == 0 or array.shape[1:] != spec.columns:
        raise LayoutError(
            f"{name} is {array.dtype}{list(array.shape)}, not "
            f"{np.dtype(spec.dtype)}[rows{''.join(f', {size}' for size in spec.columns)}]"
        )
    return array


def _stacked(events: Sequence[GrowthEvent], header: Header) -> Arrays:
    """Events as arrays [K, ...]; the layers lie one after the other."""
    arrays: Arrays = {}
    for name, spec in header.event_arrays.items():
        values = [getattr(event, name.removeprefix("event_")) for event in events]
        if spec.columns:
            values = [np.concatenate([value[layer] for layer in header.layers]) for value in values]
        arrays[name] = np.array(values, spec.dtype).reshape(len(events), *spec.columns)
    return arrays


def _unstacked(arrays: Mapping[str, NDArray[Any]], header: Header) -> list[GrowthEvent]:
    ends = np.cumsum(list(header.layers.values()))[:-1]

    def by_layer(row: int, name: str, dtype: type) -> dict[str, NDArray[Any]]:
        parts = np.split(arrays[f"event_{name}"][row].astype(dtype), ends)
        return dict(zip(header.layers, parts, strict=True))

    return [
        GrowthEvent(
            step=int(arrays["event_step"][row]),
            index=int(arrays["event_index"][row]),
            deltas=by_layer(row, "deltas", np.int64),
            ranks=by_layer(row, "ranks", np.int64),
            saliency=by_layer(row, "saliency", np.float64),
            unplaced=int(arrays["event_unplaced"][row]),
            cut={} if header.dimensions is None else by_layer(row, "cut", np.bool_),
        )
        for row in range(len(arrays["event_step"]))
    ]
