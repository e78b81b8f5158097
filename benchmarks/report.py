"""Print a table and keep it under its name, hardware and date."""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """Name of the processor and the number of its cores that we may use."""
    import os

    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def versions(*packages: str) -> str:
    """Versions of Python and of packages, for the head of a report."""
    listed = [f"Python {platform.python_version()}"]
    return ", ".join(listed + [f"{name} {version(name)}" for name in packages])


def write(title: str, about: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Print a Markdown table and write it to ``results/<title>_<hardware>_<date>.md``."""
    date = datetime.date.today().isoformat()
    hardware = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    lines = [f"# {title}", "", about, "", f"{processor()}; {date}.", ""]
    lines += [versions("numpy", "torch", "transformers", "peft"), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{title}_{hardware}_{date}.md"
    path.write_text(text)
    return path
