"""Files of a recording: a JSON header and NumPy segments of steps (docs/recording.md)."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from drlora_core import atomic
from drlora_core.bounds import LARGEST_RANK, LARGEST_STEP, MOST_DIMENSIONS, MOST_EXPERTS
from drlora_core.config import AllocatorConfig
from drlora_core.errors import LayoutError, describe_validation_error
from drlora_core.events import GrowthEvent

FILE, SEGMENTS = "recording.json", "[0-9]*.npz"
# Bits of `presence`: what a layer's sample of a step holds; 0 is a skipped layer.
SAMPLED, BITS = 1, {"routing": 2, "importance": 4, "dimensions": 8}
UNKNOWN = {"f": np.nan, "i": -1, "u": 0}  # stand for a missing value, by kind of number
SEGMENT_STEPS, SEGMENT_BYTES = 256, 8 * 2**20  # most steps of a segment, fewer where they are large
HEADER_BYTES, NPY_HEADER_BYTES = 2**24, 1024  # longest headers read: of a recording, of an array
Experts = Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
Rows = NDArray[np.void]
Segment = tuple[Rows, list[GrowthEvent]]


class Header(BaseModel):
    """Content of ``recording.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["drlora-recording"] = "drlora-recording"
    version: Literal[2] = 2
    layers: Annotated[dict[str, Experts], Field(min_length=1)]
    config: AllocatorConfig | None
    policy: str | None
    dimensions: Annotated[int, Field(ge=1, le=LARGEST_RANK)] | None
    steps: Annotated[int, Field(ge=0, le=LARGEST_STEP)] | None = None
    checksum: str | None = Field(
        default=None, exclude=True
    )  # of the fields before it; older files lack it

    @model_validator(mode="after")
    def _fits(self) -> Header:
        experts, depth = sum(self.layers.values()), self.dimensions or 1
        if experts * depth > MOST_DIMENSIONS:
            raise ValueError(
                f"a step would hold {experts} experts x {depth} rank dimensions; accepted: at most "
                f"{MOST_DIMENSIONS} (1 GiB)"
            )
        return self

    @property
    def step_type(self) -> np.dtype[np.void]:
        """Type of one step in a segment."""
        experts, layers = (sum(self.layers.values()),), (len(self.layers),)
        fields: list[Any] = [("routing", "<f8", experts), ("importance", "<f8", experts)]
        fields += [("ranks", "<i4", experts), ("tokens", "<i8", layers)]
        fields += [("presence", "|u1", layers)]
        if self.dimensions:
            fields += [("dimensions", "<f8", (*experts, self.dimensions))]
        return np.dtype(fields)

    @property
    def event_type(self) -> np.dtype[np.void]:
        """Type of one growth event in a segment."""
        experts = (sum(self.layers.values()),)
        fields: list[Any] = [("step", "<i8"), ("index", "<i8"), ("unplaced", "<i8")]
        fields += [("deltas", "<i8", experts), ("ranks", "<i8", experts)]
        fields += [("saliency", "<f8", experts)]
        if self.dimensions:
            fields += [("cut", "|b1", (*experts, self.dimensions))]
        return np.dtype(fields)

    @property
    def segment_steps(self) -> int:
        """Largest number of steps in a segment."""
        return max(1, min(SEGMENT_STEPS, SEGMENT_BYTES // self.step_type.itemsize))

    def make_rows(self, count: int) -> Rows:
        """Return steps [count] in which every value is unknown."""
        rows = np.empty(count, self.step_type)
        for name in rows.dtype.names or ():
            rows[name] = UNKNOWN[rows[name].dtype.kind]
        return rows


def split_experts(layers: Mapping[str, int]) -> dict[str, slice]:
    """Return where each layer's experts are among all experts."""
    ends = np.cumsum(list(layers.values())).tolist()
    return {name: slice(end - layers[name], end) for name, end in zip(layers, ends, strict=True)}


def write_header(folder: Path, header: Header, steps: int | None) -> None:
    """Write the header with ``steps``, which is None until the recording is complete."""
    header = header.model_copy(update={"steps": steps})
    told = json.loads(header.model_dump_json())
    text = json.dumps({**told, "checksum": checksum(told)}, indent=1)
    atomic.write_text(folder / FILE, text + "\n", make_folder=False)


def checksum(told: Mapping[str, Any]) -> str:
    """SHA-256 of the fields of a header but the checksum itself, in their order, as plain JSON."""
    text = json.dumps({name: value for name, value in told.items() if name != "checksum"})
    return hashlib.sha256(text.encode()).hexdigest()


def read_header(folder: Path) -> Header:
    file = folder / FILE
    if not folder.exists():
        raise FileNotFoundError(f"there is no recording at {folder}")
    if not file.is_file() or file.stat().st_size > HEADER_BYTES:
        raise LayoutError(
            f"{folder} has no valid {FILE}: it is not a recording, or a recording in Zarr, which "
            f"this version no longer reads: record again"
        )
    content = file.read_bytes()
    try:
        header = Header.model_validate_json(content)
    except ValidationError as error:
        what = describe_validation_error(error)
        raise LayoutError(f"{file} is damaged or of another version: {what}") from error
    if header.checksum not in (None, checksum(json.loads(content))):
        raise LayoutError(
            f"{file} is damaged: it is not what was written (its checksum differs); bring back a "
            "copy of it, or take 'checksum' out if you have edited it"
        )
    return header


def check_place(folder: Path) -> None:
    """Refuse a path where no folder can be: it, or what it lies in, is a file.

    Raises:
        LayoutError: the message names the file.
    """
    found = next((each for each in (folder, *folder.parents) if each.exists()), None)
    if found is not None and not found.is_dir():
        raise LayoutError(
            f"a recording is a folder, and {str(found)!r} is a file; choose another path than "
            f"{str(folder)!r}"
        )


def check_folder(folder: Path, header: Header, steps: int) -> None:
    """Refuse to start a recording in a folder with files, or to continue one that is not there."""
    exists = folder.is_dir() and not atomic.is_empty(folder)
    if exists != (steps > 0):
        raise LayoutError(
            f"the engine is at step {steps}, but {folder} "
            f"{'is not empty' if exists else 'holds no recording'}; record a new run from step 0 "
            f"to a new path, or resume the engine of the recording"
        )
    if exists:
        old = read_header(folder)
        if list(old.layers.items()) != list(header.layers.items()) or old.config != header.config:
            raise LayoutError(f"{folder} has other layers or another configuration; use a new path")


def ends_at(folder: Path, steps: int) -> bool:
    """True for a recording of so many steps that was not marked as complete."""
    try:
        header = read_header(folder)
        return header.steps is None and steps == sum(
            len(rows) for rows, _ in read_segments(folder, header)
        )
    except (LayoutError, OSError):
        return False


def segment_path(folder: Path, start: int) -> Path:
    return folder / f"{start + 1:08d}.npz"


def write_segment(
    folder: Path, start: int, rows: Rows, events: Sequence[GrowthEvent], header: Header
) -> None:
    """Write the segment that follows ``start`` steps; ``numpy.load`` reads it."""
    event_rows = np.zeros(len(events), header.event_type)
    for row, event in zip(event_rows, events, strict=True):
        for name in event_rows.dtype.names or ():
            value = getattr(event, name)
            if isinstance(value, Mapping):
                value = np.concatenate([value[layer] for layer in header.layers])
            row[name] = value

    def write(part: Path) -> None:
        with part.open("wb") as stream:
            np.savez(stream, steps=rows, events=event_rows)

    atomic.write_file(segment_path(folder, start), write, make_folder=False)


def read_segments(folder: Path, header: Header, stop: int = sys.maxsize) -> Iterator[Segment]:
    """Yield the steps and events of each segment, up to the segment that holds step ``stop``."""
    start = 0
    for path in sorted(folder.glob(SEGMENTS)):
        if start >= stop:
            return
        with path.open("rb") as stream:
            try:
                if path != segment_path(folder, start):
                    raise LayoutError(f"the segment before it, with step {start + 1}, is missing")
                rows, events = _read_segment(stream, header, start)
            except Exception as error:  # BadZipFile, EOFError, KeyError, MemoryError, ...
                raise LayoutError(
                    f"segment {path} is damaged ({type(error).__name__}: {error}); to read the "
                    f"{start} steps before it, move it and all later segments out of the folder"
                ) from error
        start += len(rows)
        yield rows, events


def _read_segment(stream: IO[bytes], header: Header, start: int) -> Segment:
    arrays = []
    with zipfile.ZipFile(stream) as archive:
        for name, dtype in (("steps", header.step_type), ("events", header.event_type)):
            info = archive.getinfo(f"{name}.npy")
            most = header.segment_steps * dtype.itemsize + NPY_HEADER_BYTES
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
                raise LayoutError(f"{name} are compressed or have more than {most} bytes")
            content = io.BytesIO(archive.read(info))  # the whole member, to check its CRC
            array = np.lib.format.read_array(content, allow_pickle=False)
            if array.dtype != dtype or array.ndim != 1:
                raise LayoutError(f"{name} are {array.dtype}{list(array.shape)}, not {dtype}")
            arrays.append(array)
    rows, events = arrays
    at = events["step"]
    if ((at <= start) | (at > start + len(rows))).any() or (np.diff(at) < 1).any():
        raise LayoutError(f"it has events after steps {at.tolist()}, which are not its own")
    return rows, [_to_event(row, header) for row in events]


def _to_event(row: Any, header: Header) -> GrowthEvent:
    fields: dict[str, Any] = {"cut": {}}
    for name in row.dtype.names:
        if row[name].ndim == 0:
            fields[name] = int(row[name])
        else:
            parts = split_experts(header.layers).items()
            fields[name] = {layer: row[name][part].copy() for layer, part in parts}
    return GrowthEvent(**fields)


def discard_steps(folder: Path, header: Header, steps: int) -> list[GrowthEvent]:
    """Keep the first ``steps`` steps, mark the recording as incomplete, and return its events.

    If there are fewer steps, or one of them is damaged, nothing is discarded.
    """
    start = end = 0
    rows, events = header.make_rows(0), []
    for rows, new in read_segments(folder, header, stop=steps):
        start, end = end, end + len(rows)
        events += [event for event in new if event.step <= steps]
    if end < steps:
        raise LayoutError(
            f"the recording {folder} ends at step {end}, the engine is at step {steps}; "
            f"resume from an earlier state, or record a new run"
        )
    write_header(folder, header, None)
    for path in sorted(folder.glob(SEGMENTS), reverse=True):  # last first: a crash leaves no gap
        if not steps or path > segment_path(folder, start):
            path.unlink()
    if end > steps:
        kept = [event for event in events if event.step > start]
        write_segment(folder, start, rows[: steps - start], kept, header)
    return events
