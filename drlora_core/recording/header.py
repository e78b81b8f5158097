"""The header of a recording: what its segments hold (docs/recording.md, version 2).

Shapes: L layers, E experts of all layers one after the other, R rank dimensions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from drlora_core import atomic
from drlora_core.config import AllocatorConfig
from drlora_core.errors import LayoutError

FILE = "recording.json"
SAMPLED, BITS = 1, {"routing": 2, "importance": 4, "dimensions": 8}
"""Bits of ``presence``: what a layer's sample of a step holds; 0 is a skipped layer."""
UNKNOWN_TOKENS = -1
SEGMENT_STEPS, SEGMENT_BYTES = 256, 8 * 2**20
"""Most steps of a segment, and its size where steps are so wide that fewer fit."""
HEADER_BYTES = 2**24
"""Longest header that is read."""
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class ArraySpec(NamedTuple):
    """One array of a segment; its first dimension counts steps or events."""

    dtype: type
    columns: tuple[int, ...]
    fill: float = 0
    """Value where the engine gave none."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one step or event."""
        return math.prod(self.columns) * np.dtype(self.dtype).itemsize


class Header(BaseModel):
    """Content of ``recording.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["drlora-recording"] = "drlora-recording"
    version: Literal[2] = 2
    layers: Annotated[dict[str, Count], Field(min_length=1)]
    """Experts of each layer, in the order of the engine."""
    config: AllocatorConfig | None
    policy: str | None
    dimensions: Count | None
    """R where rank dimensions are recorded (policy ``prune``)."""
    segment_steps: Count = SEGMENT_STEPS
    """Most steps of a segment."""
    steps: NonNegativeInt | None = None
    """Steps when the writer closed the recording; None while it is at work."""

    @property
    def step_arrays(self) -> dict[str, ArraySpec]:
        """Arrays with a row per step."""
        experts = sum(self.layers.values())
        arrays = {
            "routing": ArraySpec(np.float64, (experts,), np.nan),
            "importance": ArraySpec(np.float64, (experts,), np.nan),
            "ranks": ArraySpec(np.int32, (experts,)),
            "tokens": ArraySpec(np.int64, (len(self.layers),), UNKNOWN_TOKENS),
            "presence": ArraySpec(np.uint8, (len(self.layers),)),
        }
        if self.dimensions is not None:
            arrays["dimensions"] = ArraySpec(np.float64, (experts, self.dimensions), np.nan)
        return arrays

    @property
    def event_arrays(self) -> dict[str, ArraySpec]:
        """Arrays with a row per growth event that follows a step of the segment."""
        experts = sum(self.layers.values())
        arrays = {
            **dict.fromkeys(("step", "index", "unplaced"), ArraySpec(np.int64, ())),
            **dict.fromkeys(("deltas", "ranks"), ArraySpec(np.int32, (experts,))),
            "saliency": ArraySpec(np.float64, (experts,)),
        }
        if self.dimensions is not None:
            arrays["cut"] = ArraySpec(np.bool_, (experts, self.dimensions))
        return {f"event_{name}": spec for name, spec in arrays.items()}

    def with_segment_steps(self, steps: int | None) -> Header:
        """Return the header with so many steps a segment; None: as many as SEGMENT_BYTES allow."""
        width = sum(spec.row_bytes for spec in self.step_arrays.values())
        chosen = steps or max(1, min(SEGMENT_STEPS, SEGMENT_BYTES // width))
        return self.model_copy(update={"segment_steps": chosen})

    def with_steps(self, steps: int | None) -> Header:
        """Return the header of a recording that is closed, or being written (None)."""
        return self.model_copy(update={"steps": steps})


def write(folder: Path, header: Header) -> None:
    """Write or replace the header."""
    atomic.write_text(folder / FILE, header.model_dump_json(indent=1) + "\n")


def read(folder: Path) -> Header:
    """Read and check the header.

    Raises:
        LayoutError: not a recording, another version, or damaged.
        FileNotFoundError: there is nothing at the path.
    """
    file = folder / FILE
    if not folder.exists():
        raise FileNotFoundError(f"there is no recording at {folder}")
    if not file.is_file() and (folder / "zarr.json").exists():
        raise LayoutError(
            f"{folder} is a recording in Zarr, which this version no longer reads: record again"
        )
    if not file.is_file() or file.stat().st_size > HEADER_BYTES:
        raise LayoutError(f"{folder} is not a recording: it has no {FILE} that can be one's header")
    try:
        return Header.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise LayoutError(f"{file} is damaged or of another version: {what}") from error
