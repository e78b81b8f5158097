"""What the commands share: configurations from options, reading recordings, tables, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from drlora_core.config import AllocatorConfig
from drlora_core.errors import DRLoRAError, LayoutError, near_misses
from drlora_core.recording import Recording, load_trace
from drlora_core.recording.traces import ImportanceChoice

HEADERS = ("recording.json", "zarr.json")  # of today, and of those that `Recording.open` refuses
SET_HELP = (
    "A field of the allocator's configuration, NAME=VALUE, such as r_target=16 or policy=rescored; "
    "may be repeated. Fields: " + ", ".join(AllocatorConfig.model_fields) + "."
)


def allocator(
    base: Mapping[str, Any], file: Path | None, settings: Sequence[str]
) -> AllocatorConfig:
    """Return the configuration of a JSON file (or the base), changed by ``NAME=VALUE`` settings.

    Raises:
        DRLoRAError: an unreadable file or setting.
        pydantic.ValidationError: a value that the configuration refuses.
    """
    values: dict[str, Any] = dict(base)
    if file is not None:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DRLoRAError(f"{file} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DRLoRAError(f"{file} does not hold an allocator's configuration, a JSON object")
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise DRLoRAError(f"--set {setting}: write NAME=VALUE, such as r_target=16")
        if name not in AllocatorConfig.model_fields:
            hint = near_misses(name, AllocatorConfig.model_fields)
            raise DRLoRAError(f"--set {setting}: no such field; {hint}")
        values[name] = _value(text)
    return AllocatorConfig(**values)


def _value(text: str) -> Any:
    """Read a setting as JSON where it is, else as a string."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text


def open_recording(path: Path, importance: ImportanceChoice = "ones") -> Recording:
    """Open a recording, a run's directory that has one, or a routing trace (.npz).

    Raises:
        LayoutError: there is none, or several.
    """
    if path.suffix == ".npz":
        return load_trace(path, importance=importance)
    return Recording.open(find_recording(path))


def find_recording(path: Path) -> Path:
    """Return the path itself if it is a recording, else the one recording directly in it."""
    if not path.is_dir() or any((path / name).exists() for name in HEADERS):
        return path
    found = sorted({child.parent for name in HEADERS for child in path.glob(f"*/{name}")})
    if len(found) == 1:
        return found[0]
    if not found:
        raise LayoutError(f"{path} holds no recording (no directory in it has a recording.json)")
    names = ", ".join(child.name for child in found)
    raise LayoutError(f"{path} holds several recordings ({names}); name one of them")


def table(title: str, rows: Sequence[Mapping[str, Any]], note: str | None = None) -> None:
    """Print rows as a table; numbers stand to the right."""
    if not rows:
        return
    made = Table(title=title, title_justify="left", title_style="bold", caption=note)
    made.caption_justify = "left"
    for name, value in rows[0].items():
        made.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        made.add_row(*(shown(value) for value in row.values()))
    console().print(made)


def say(text: str) -> None:
    """Print a line."""
    console().print(text, markup=False, highlight=False)


def console() -> Console:
    """Return a console for standard output; lines are not cut where it is not a terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=200)


def shown(value: Any) -> str:
    """Return a table cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def emit(values: Any) -> None:
    """Print JSON; numbers that JSON does not have become null."""
    print(json.dumps(_plain(values), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def binary(size: int) -> str:
    """Return bytes in a readable unit.

    Example:
        >>> binary(3 * 2**30)
        '3.00 GiB'
    """
    amount, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.2f} {unit}"
