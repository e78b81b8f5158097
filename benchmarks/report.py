"""Print the tables of a benchmark, and write them to a file named by hardware and date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from drlora_core.atomic import write_text

RESULTS = Path(__file__).parent / "results"


class Table(NamedTuple):
    """A table with a heading and a description."""

    heading: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> list[str]:
        """The table in Markdown."""
        head = [f"## {self.heading}", ""] if self.heading else []
        head += [self.about, ""] if self.about else []
        head += ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        return [*head, *("| " + " | ".join(row) + " |" for row in self.rows), ""]


def processor() -> str:
    """Name of the processor and number of cores."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def threads() -> str:
    """Number of threads of torch, if it is loaded."""
    torch = sys.modules.get("torch")
    return "" if torch is None else f", {torch.get_num_threads()} threads"


def versions(*packages: str) -> str:
    """Versions of Python and of the installed ones of some packages."""
    installed = [name for name in packages if find_spec(name) is not None]
    listed = [f"Python {platform.python_version()}"]
    return ", ".join(listed + [f"{name} {version(name)}" for name in installed])


def write(
    stem: str, heading: str, about: str, tables: Sequence[Table], *, show: bool = True
) -> Path:
    """Write tables in Markdown to ``results/<stem>_<hardware>_<date>.md``, and print them."""
    date = datetime.date.today().isoformat()
    hardware = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    lines = [f"# {heading}", "", about, "", f"{processor()}{threads()}; {date}.", ""]
    lines += [versions("numpy", "torch", "transformers", "peft"), ""]
    lines += [line for table in tables for line in table.lines()]
    text = "\n".join(lines[:-1]) + "\n"
    if show:
        print(text)
    path = RESULTS / f"{stem}_{hardware}_{date}.md"
    write_text(path, text)
    return path
