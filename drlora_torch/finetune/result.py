"""What a run came to, and how it is shown."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

METHODS = {"uniform": "uniform LoRA"}
BLOCKS = "▁▂▃▄▅▆▇█"
MOST_BLOCKS = 64  # experts that fit on a line


class RunResult(BaseModel):
    """Figures of one finished training."""

    model_config = ConfigDict(frozen=True)

    method: str
    loss_before: float
    """Held-out loss of the base model, nats per token."""
    loss_after: float
    tokens_per_second: float
    """Training tokens, padding left out, over the time of training."""
    seconds: float
    """Of training alone."""
    peak_memory_mb: float
    """Of the process, or of the GPU where there is one."""
    budget: int
    """Total rank that was allowed."""
    total_rank: int
    skipped_steps: int
    ranks: dict[str, list[int]]
    files: list[str]


def peak_memory_mb() -> float:
    """Highest memory of the GPU, or of this process, so far, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def show(console: Console, results: list[RunResult], folder: Path) -> None:
    """Print the tables of a finished run."""
    console.print(_summary(results))
    for result in results:
        if len({rank for ranks in result.ranks.values() for rank in ranks}) > 1:
            console.print(_ranks(result))
    console.print(f"Files in {folder}:")
    for result in results:
        for name in result.files:
            console.print(f"  {name}", highlight=False)


def _summary(results: list[RunResult]) -> Table:
    table = Table(title="Fine-tuning", show_lines=False)
    table.add_column("")
    for result in results:
        table.add_column(method_name(result.method), justify="right")
    rows = {
        "held-out loss before": [f"{r.loss_before:.4f}" for r in results],
        "held-out loss after": [f"{r.loss_after:.4f}" for r in results],
        "total rank / budget": [f"{r.total_rank} / {r.budget}" for r in results],
        "tokens per second": [f"{r.tokens_per_second:,.0f}" for r in results],
        "training seconds": [f"{r.seconds:.1f}" for r in results],
        "peak memory": [f"{r.peak_memory_mb:,.0f} MiB" for r in results],
    }
    for label, values in rows.items():
        table.add_row(label, *values)
    return table


def _ranks(result: RunResult) -> Table:
    names = _distinct_parts(list(result.ranks))
    table = Table(title=f"Ranks per layer, {method_name(result.method)}")
    for column, justify in (
        ("layer", "left"),
        ("min", "right"),
        ("mean", "right"),
        ("max", "right"),
        ("top experts", "left"),
        ("rank of each expert", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    highest = max(max(ranks) for ranks in result.ranks.values())
    for name, listed in zip(names, result.ranks.values(), strict=True):
        ranks = np.array(listed)
        top = np.lexsort((np.arange(ranks.size), -ranks))[:3]
        table.add_row(
            name,
            str(ranks.min()),
            f"{ranks.mean():.2f}",
            str(ranks.max()),
            ", ".join(f"{expert} ({ranks[expert]})" for expert in top),
            _bars(ranks, highest),
        )
    return table


def method_name(policy: str) -> str:
    """Name a method as tables show it."""
    return METHODS.get(policy, f"DR-LoRA, {policy}")


def _distinct_parts(names: list[str]) -> list[str]:
    """Leave out what dotted names have in common at the end: ``model.layers.0`` is enough."""
    parts = [name.split(".") for name in names]
    while len({tuple(part[-1:]) for part in parts}) == 1 and all(len(p) > 1 for p in parts):
        parts = [part[:-1] for part in parts]
    return [".".join(part) for part in parts]


def _bars(ranks: np.ndarray, highest: int) -> str:
    if ranks.size > MOST_BLOCKS:
        return f"{ranks.size} experts"
    return "".join(BLOCKS[(len(BLOCKS) - 1) * int(rank) // highest] for rank in ranks)
