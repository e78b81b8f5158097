"""Print tables and keep them under their name, hardware and date."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Table(NamedTuple):
    """A table under a heading; ``about`` says what is in it."""

    heading: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """In Markdown."""
        head = [f"## {self.heading}", ""] if self.heading else []
        head += [self.about, ""] if self.about else []
        head += ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        return [*head, *("| " + " | ".join(row) + " |" for row in self.rows), ""]


def processor() -> str:
    """Name of the processor and the number of its cores that we may use."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def versions(*packages: str) -> str:
    """Versions of Python and of packages, for the head of a report."""
    listed = [f"Python {platform.python_version()}"]
    return ", ".join(listed + [f"{name} {version(name)}" for name in packages])


def write(title: str, about: str, tables: Sequence[Table], show: bool = True) -> Path:
    """Write tables in Markdown to ``results/<title>_<hardware>_<date>.md``, and print them."""
    import torch

    date = datetime.date.today().isoformat()
    hardware = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    lines = [f"# {title}", "", about, ""]
    lines += [f"{processor()}, {torch.get_num_threads()} threads; {date}.", ""]
    lines += [versions("numpy", "torch", "transformers", "peft"), ""]
    lines += [line for table in tables for line in table.lines()]
    text = "\n".join(lines[:-1]) + "\n"
    if show:
        print(text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{title}_{hardware}_{date}.md"
    path.write_text(text)
    return path
