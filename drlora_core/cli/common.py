"""What the commands share: configurations from options, reading recordings, tables, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic_core
import typer
from rich.console import Console
from rich.table import Table

from drlora_core.config import AllocatorConfig
from drlora_core.errors import DRLoRAError, LayoutError, near_misses
from drlora_core.recording import Recording, load_trace

HEADERS = ("recording.json", "zarr.json")  # of today, and of those that `Recording.open` refuses
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="A field of the allocator's configuration, NAME=VALUE, such as r_target=16 or "
        f"policy=rescored; may be repeated. Fields: {', '.join(AllocatorConfig.model_fields)}.",
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(help="JSON file of the allocator configuration.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def build_config(
    base: Mapping[str, Any], file: Path | None, settings: Sequence[str] | None
) -> AllocatorConfig:
    """Read a configuration from a JSON file (or the base) and apply ``NAME=VALUE`` settings."""
    values: dict[str, Any] = dict(base)
    if file is not None:
        values = AllocatorConfig.model_validate_json(file.read_bytes()).model_dump()
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals:
            raise DRLoRAError(f"--set {setting}: write NAME=VALUE, such as r_target=16")
        if name not in AllocatorConfig.model_fields:
            hint = near_misses(name, AllocatorConfig.model_fields)
            raise DRLoRAError(f"--set {setting}: no such field; {hint}")
        values[name] = _parse_value(text)
    return AllocatorConfig(**values)


def _parse_value(text: str) -> Any:
    """Read a setting as JSON if possible, else as a string."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text


def choose(option: str, value: str, accepted: Iterable[str]) -> Any:
    """Return the value of an option if it is one of those accepted; else name them."""
    known = list(accepted)
    if value in known:
        return value
    hint = near_misses(value, known)
    ending = f"; {hint}" if hint.endswith("?") else ""
    raise DRLoRAError(f"--{option} {value}: accepted: {', '.join(known)}{ending}")


def open_recording(path: Path, importance: Any = "ones") -> Recording:
    """Open a recording, a run's directory that has one, or a routing trace (.npz)."""
    if path.suffix == ".npz":
        return load_trace(path, importance=importance)
    return Recording.open(find_recording(path))


def find_recording(path: Path) -> Path:
    """Return the path itself if it is a recording, else the one recording directly in it."""
    if not path.is_dir() or any((path / name).exists() for name in HEADERS):
        return path
    found = sorted({child.parent for name in HEADERS for child in path.glob(f"*/{name}")})
    if not found:
        raise LayoutError(f"{path} holds no recording (no directory in it has a recording.json)")
    if len(found) > 1:
        names = ", ".join(child.name for child in found)
        raise LayoutError(f"{path} holds several recordings ({names}); name one of them")
    return found[0]


def table(title: str, rows: Sequence[Mapping[str, Any]], note: str | None = None) -> None:
    """Print rows as a table; numbers are right-aligned."""
    if not rows:
        return
    made = Table(title=title, title_justify="left", title_style="bold", caption=note)
    made.caption_justify = "left"
    for name, value in rows[0].items():
        made.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        made.add_row(*(format_cell(value) for value in row.values()))
    _console().print(made)


def say(text: str) -> None:
    _console().print(text, markup=False, highlight=False)


def _console() -> Console:
    """Return a console for standard output; it cuts no lines if the output is not a terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=200)


def format_cell(value: Any) -> str:
    """Format a table cell; - where there is no value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def emit(values: Any) -> None:
    """Print JSON; NaN and infinity become null."""
    text = pydantic_core.to_json(values, indent=2, inf_nan_mode="null", fallback=np.ndarray.tolist)
    print(text.decode())


def format_bytes(size: int) -> str:
    """Format a number of bytes in a readable unit, such as 3.00 GiB."""
    amount, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        del units[0]
    return f"{amount:.2f} {units[0]}"
