"""What the commands share: configurations from options, reading recordings, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic_core
import typer
from pydantic import ValidationError

from drlora_core.atomic import is_empty
from drlora_core.cli.console import is_unicode
from drlora_core.config import AllocatorConfig
from drlora_core.errors import DRLoRAError, describe_validation_error, near_misses, printable
from drlora_core.recording import Recording, load_trace
from drlora_core.runs import find_recording

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
        try:
            values = AllocatorConfig.model_validate_json(file.read_bytes()).model_dump()
        except ValidationError as error:
            raise DRLoRAError(f"--allocator {file}: {describe_validation_error(error)}") from error
    return AllocatorConfig(**values | read_settings(settings))


def read_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """Read ``NAME=VALUE`` settings: values by field of :class:`AllocatorConfig`."""
    values: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals:
            raise DRLoRAError(f"--set {setting}: write NAME=VALUE, such as r_target=16")
        if name not in AllocatorConfig.model_fields:
            hint = near_misses(name, AllocatorConfig.model_fields)
            raise DRLoRAError(f"--set {setting}: no such field; {hint}")
        values[name] = _parse_value(text)
    return values


def _parse_value(text: str) -> Any:
    """Read a setting as JSON if possible, else as a string."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except (ValueError, RecursionError):
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


def emit(values: Any) -> None:
    """Print JSON; other characters than ASCII are escaped where the output cannot encode them."""
    text = printable(to_json(values))
    print(text if is_unicode(sys.stdout) else json.dumps(json.loads(text), indent=2))


def check_output(output: Path, *, folder: bool = False) -> None:
    """Refuse an output that exists or cannot be made, before anything is loaded.

    Args:
        output: a new file, or a new or empty folder.
        folder: it is a folder.
    """
    empty = folder and output.is_dir() and is_empty(output)
    if os.path.lexists(output) and not empty:
        raise DRLoRAError(f"{str(output)!r} exists; use another --output")
    nearest = next(parent for parent in (*output.parents, Path.cwd()) if os.path.lexists(parent))
    if not nearest.is_dir():
        raise DRLoRAError(f"{str(nearest)!r} is a file, so that {str(output)!r} cannot be written")
    if not os.access(nearest, os.W_OK):
        raise DRLoRAError(f"{str(nearest)!r} cannot be written to; use another --output")


def to_json(values: Any) -> str:
    """Return JSON; NaN and infinity become null."""
    made = pydantic_core.to_json(values, indent=2, inf_nan_mode="null", fallback=np.ndarray.tolist)
    return made.decode()


def format_bytes(size: int) -> str:
    """Format a number of bytes in a readable unit, such as 3.00 GiB."""
    amount, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        del units[0]
    return f"{amount:.2f} {units[0]}"
