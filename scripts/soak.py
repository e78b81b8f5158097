"""Train a tiny model for many steps: is the last step as cheap as an early one?

`python -m scripts.soak --steps 20000` compares blocks of steps: their median time, the memory of
the process, its open files, and live tensors. It ends with status 1 if one of them grew.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import track

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from scripts.fuzz.torch_targets import base

BLOCKS = 10


class Block(NamedTuple):
    """What is measured of a tenth of the steps."""

    milliseconds: float
    mebibytes: float
    handles: int
    tensors: int


def measure(times: list[float]) -> Block:
    """Measure the process as it is now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    return Block(
        1000 * statistics.median(times),
        pages * resource.getpagesize() / 2**20,
        len(list(Path("/proc/self/fd").iterdir())),
        tensors,
    )


def train(steps: int) -> list[Block]:
    """Train, with growth in the first quarter, and measure each tenth."""
    model, width = base().train(), max(1, steps // BLOCKS)
    config = AllocatorConfig.for_training(steps, r_target=4, r_max=8)
    adapter = drlora_torch.attach(model, AllocatorEngine(config))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    draw, blocks = torch.Generator().manual_seed(0), []
    for start in track(range(0, steps, width), description="steps"):
        times = []
        for _ in range(start, min(start + width, steps)):
            tokens = torch.randint(1, 32, (2, 16), generator=draw)
            begin = time.perf_counter()
            step(model, optimizer, tokens)
            times.append(time.perf_counter() - begin)
        blocks.append(measure(times))
    assert adapter.skipped_steps == 0
    assert sum(map(sum, adapter.ranks().values())) == 2 * 4 * 4, "the budget is met"
    adapter.detach()
    return blocks


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def grown(blocks: list[Block]) -> list[str]:
    """Name what grew between the fourth and the last block: by 20 % of time, or 2 % of others."""
    early, late = blocks[3], blocks[-1]  # after the growth
    limits = {"milliseconds": 1.2, "mebibytes": 1.02, "handles": 1.0, "tensors": 1.02}
    return [
        f"{name}: {getattr(early, name):g} in block 4, {getattr(late, name):g} in the last one"
        for name, most in limits.items()
        if getattr(late, name) > most * getattr(early, name)
    ]


def main(steps: Annotated[int, typer.Option(min=20, help="Optimizer steps.")] = 20_000) -> None:
    """Train a tiny model for many steps and see whether anything grows."""
    torch.set_num_threads(1)  # several would wait for each other
    blocks = train(steps)
    for number, block in enumerate(blocks, start=1):
        print(
            f"{number * steps // BLOCKS:7,} steps: {block.milliseconds:6.2f} ms a step, "
            f"{block.mebibytes:6.0f} MiB, {block.handles} files, {block.tensors} tensors"
        )
    if problems := grown(blocks):
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    typer.run(main)
