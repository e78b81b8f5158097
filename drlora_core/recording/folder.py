"""The folder of a recording: reading its segments in order, and discarding its last steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from drlora_core.errors import LayoutError
from drlora_core.events import GrowthEvent
from drlora_core.recording import header as headers
from drlora_core.recording import segment
from drlora_core.recording.header import Header
from drlora_core.recording.segment import Arrays


def segment_path(folder: Path, start: int) -> Path:
    """Where the segment after ``start`` steps lies; its name is its first step."""
    return folder / f"{start + 1:08d}.npz"


def segment_paths(folder: Path) -> list[Path]:
    """Every segment there is, in order."""
    return sorted(folder.glob("[0-9]*.npz"), key=lambda path: (len(path.name), path.name))


def read_segments(folder: Path, header: Header) -> Iterator[tuple[Arrays, list[GrowthEvent]]]:
    """Yield the arrays over steps and the events of every segment, in order.

    Raises:
        LayoutError: naming the file that is damaged or missing, and which steps are readable.
    """
    steps = 0
    for path in segment_paths(folder):
        readable = "no step before it is recorded"
        if steps:
            readable = (
                f"to read steps 1 to {steps}, move {path.name} and all later segments out of the "
                f"folder"
            )
        wanted = segment_path(folder, steps)
        if path != wanted:
            raise LayoutError(
                f"step {steps + 1} is missing: there is no segment {wanted}; {readable}"
            )
        try:
            arrays, events = segment.read(path, header, steps)
        except LayoutError as error:
            raise LayoutError(f"segment {path} is damaged ({error}); {readable}") from error
        steps += len(arrays["presence"])
        yield arrays, events


def truncate(folder: Path, header: Header, steps: int) -> tuple[int, Arrays, list[GrowthEvent]]:
    """Discard what follows the first ``steps`` steps, and mark the recording as being written.

    Returns:
        How many steps lie before the last segment if it is not full (else all), the arrays of that
        segment, and all events that are left.

    Raises:
        LayoutError: there are fewer steps, or a segment is damaged; nothing was discarded.
    """
    start = end = 0
    arrays: Arrays = {}
    events: list[GrowthEvent] = []
    for arrays, new in read_segments(folder, header) if steps else ():
        start, end = end, end + len(arrays["presence"])
        events += [event for event in new if event.step <= steps]
        if end >= steps:
            break
    if end < steps:
        raise LayoutError(
            f"the recording {folder} ends at step {end}, the engine is at step {steps}; "
            f"resume from an earlier state, or record to a new path from the start"
        )
    headers.write(folder, header.with_steps(None))
    kept = segment_path(folder, start) if steps else None
    for path in reversed(segment_paths(folder)):  # from the end, so that no hole is ever left
        if path == kept:
            break
        path.unlink()
    arrays = {name: rows[: steps - start] for name, rows in arrays.items()}
    if kept is not None and end > steps:
        segment.write(kept, arrays, [event for event in events if event.step > start], header)
    if steps - start == header.segment_steps:
        return steps, {}, events
    return start, arrays, events
