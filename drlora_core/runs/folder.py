"""Names of the files in the folder of a run, and how a recording is found in it."""

from __future__ import annotations

from pathlib import Path

from drlora_core.errors import LayoutError

RECIPE, RESULT, METRICS, RECORDING = "run.yaml", "result.json", "metrics.jsonl", "recording"
REPORT = "report.html"
HEADERS = ("recording.json", "zarr.json")  # of today, and of those that `Recording.open` refuses


def find_recording(path: Path) -> Path:
    """Return the path itself if it is a recording, else the one recording directly in it.

    Raises:
        LayoutError: the folder holds no recording, or several.
    """
    if not path.is_dir() or any((path / name).exists() for name in HEADERS):
        return path
    found = sorted({child.parent for name in HEADERS for child in path.glob(f"*/{name}")})
    if not found:
        raise LayoutError(f"{path} holds no recording (no directory in it has a recording.json)")
    if len(found) > 1:
        names = ", ".join(child.name for child in found)
        raise LayoutError(f"{path} holds several recordings ({names}); name one of them")
    return found[0]
