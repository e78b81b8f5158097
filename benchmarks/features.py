"""What each training feature costs: a drlora step with it over one without.

python -m benchmarks.features
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch.utils.checkpoint import checkpoint

import drlora_torch
from benchmarks import report
from benchmarks.expert_step import RANK, SHAPES, Shape, drlora, make_block, make_input
from drlora_core import AllocatorConfig, AllocatorEngine

Step = Callable[[], None]


def checkpointed(reentrant: bool) -> Callable[[Shape, torch.dtype], Step]:
    """The block is run a second time in backward."""

    def build(shape: Shape, dtype: torch.dtype) -> Step:
        block, hidden, finish = adapted(shape, dtype)

        def step() -> None:
            output = checkpoint(block, hidden, use_reentrant=reentrant)
            output.backward(torch.ones_like(output))
            finish()

        return step

    return build


def autocast(shape: Shape, dtype: torch.dtype) -> Step:
    """A float32 block under bfloat16 autocast."""
    block, hidden, finish = adapted(shape, dtype)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = block(hidden)
        output.backward(torch.ones_like(output))
        finish()

    return step


def adapted(shape: Shape, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor, Step]:
    """A block with static ranks, its input, and what ends a step."""
    config = AllocatorConfig(r_init=RANK, r_target=RANK, r_max=RANK)
    block, hidden = make_block(shape, dtype, "grouped_mm").train(), make_input(shape, dtype)
    adapter = drlora_torch.attach(block, AllocatorEngine(config))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)

    def finish() -> None:
        hidden.grad = None
        optimizer.step()
        optimizer.zero_grad()

    return block, hidden, finish


PLAIN = "plain"
FEATURES: dict[str, Callable[[Shape, torch.dtype], Step]] = {
    PLAIN: drlora(r_max=RANK, growing=False),
    "layout masked, r_max = 2 r_target": drlora(r_max=2 * RANK, growing=False, layout="masked"),
    "dropout 0.1": drlora(r_max=RANK, growing=False, dropout=0.1),
    "kernel grouped": drlora(r_max=RANK, growing=False, kernel="grouped"),
    "checkpointing": checkpointed(reentrant=False),
    "checkpointing, reentrant": checkpointed(reentrant=True),
    "autocast to bfloat16": autocast,
}


def main(
    shape: Annotated[str, typer.Option(help="olmoe, qwen3 or small.")] = "small",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 9,
) -> None:
    """Measure and write the table."""
    chosen = SHAPES[shape]
    steps = {name: build(chosen, torch.float32) for name, build in FEATURES.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for warm in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if warm:
                taken[name].append(time.perf_counter() - started)
    rows = [
        [
            name,
            f"{statistics.median(times):.3f}",
            f"{statistics.median(a / b for a, b in zip(times, taken[PLAIN], strict=True)):.2f}",
        ]
        for name, times in taken.items()
    ]
    about = f"{chosen}, float32, static rank {RANK}; medians of {rounds} interleaved rounds."
    report.write(f"features_{shape}", about, ["feature", "s / step", "/ plain"], rows)


if __name__ == "__main__":
    typer.run(main)
