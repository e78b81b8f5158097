"""The files that the commands of a page take for granted: data, a recipe, a run, traces.

The words MODEL and DATA of a page are names of files here, so commands run as they are printed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.docs import hub, pages

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(8) for b in range(8)]


def write_rows(path: Path, ask: str = "prompt", reply: str = "completion") -> None:
    """Write sums of two digits under these names of columns."""
    rows = [json.dumps({ask: question, reply: answer}) for question, answer in SUMS]
    path.write_text("\n".join(rows))


def finetuning(folder: Path, cache: Path) -> None:
    """The page's recipe, and data with its columns."""
    (recipe,) = re.findall(r"```yaml\n(.*?)```", pages.read("docs/finetuning.md"), flags=re.S)
    (folder / "run.yaml").write_text(recipe)
    write_rows(folder / "my.jsonl", "question", "answer")


def placeholders(folder: Path, cache: Path) -> None:
    (folder / "MODEL").symlink_to(hub.place(cache, hub.OLMOE))
    (folder / "DATA").mkdir()
    write_rows(folder / "DATA" / "train.jsonl")
    lines = ["ask,reply", *(f"{question},{answer}" for question, answer in SUMS)]
    (folder / "my.csv").write_text("\n".join(lines))


def traces(folder: Path, cache: Path) -> None:
    """Two tasks with routing of their own, in the layout that the page describes."""
    for seed, task in enumerate(("intent", "law")):
        generator = np.random.default_rng(seed)
        preferred = generator.dirichlet(np.ones(32), size=3)
        tokens = generator.integers(50, 100, size=40)
        counts = np.stack([[generator.multinomial(6 * n, p) for p in preferred] for n in tokens])
        np.savez(folder / f"{task}.npz", weight_sum=counts / 6, tokens=tokens)


FILES: dict[str, Callable[[Path, Path], None]] = {
    "docs/deepseek_traces.md": traces,
    "docs/distributed.md": placeholders,
    "docs/finetuning.md": finetuning,
    "docs/howto/data_formats.md": placeholders,
}


def write(page: str, folder: Path, cache: Path, run: Path) -> None:
    """Write what a reader of the page has; the run is the one that the page reports on, if any."""
    (folder / "examples").symlink_to(pages.ROOT / "examples")
    write_rows(folder / "my.jsonl")
    FILES.get(page, lambda folder, cache: None)(folder, cache)
    for name in re.findall(r"^drlora report (runs/\S+)", pages.read(page), flags=re.M):
        assert re.sub(r"\d", "0", Path(name).name) == re.sub(r"\d", "0", run.name)  # a time
        shutil.copytree(run, folder / name)
