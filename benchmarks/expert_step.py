"""Cost of a training step of one MoE block: frozen, with drlora, with PEFT's LoRA on experts.

    python -m benchmarks.expert_step                 # the table, written to benchmarks/results
    python -m benchmarks.expert_step --shape small --rounds 9

All methods run in turn within each round, so that a ratio compares neighbours in time. Memory is
counted, not timed: the most bytes of tensors that a step allocates and holds at once.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import drlora_torch
from benchmarks import memory, report
from drlora_core import AllocatorConfig, AllocatorEngine

RANK = 16
Step = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Experts N, model width H, expert width I, experts per token K, tokens T."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int


SHAPES = {
    "olmoe": Shape(64, 2048, 1024, 8, 512),
    "qwen3": Shape(128, 2048, 768, 8, 512),
    "small": Shape(64, 512, 256, 8, 1024),
}


def make_block(shape: Shape, dtype: torch.dtype, implementation: str) -> OlmoeSparseMoeBlock:
    """A frozen block with random weights."""
    config = OlmoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = OlmoeSparseMoeBlock(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
        parameter.requires_grad_(False)
    return block


def make_input(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, shape.tokens, shape.hidden, generator=generator).to(dtype)
    return hidden.requires_grad_(True)


def forward_backward(block: nn.Module, hidden: torch.Tensor) -> None:
    output = block(hidden)
    output.backward(torch.ones_like(output))
    hidden.grad = None


def frozen(implementation: str) -> Callable[[Shape, torch.dtype], Step]:
    def build(shape: Shape, dtype: torch.dtype) -> Step:
        block, hidden = make_block(shape, dtype, implementation), make_input(shape, dtype)
        return lambda: forward_backward(block, hidden)

    return build


def drlora(
    r_max: int, growing: bool, rank: int = RANK, **options: Any
) -> Callable[[Shape, torch.dtype], Step]:
    """Forward, backward, statistics and AdamW; growing: an event every fourth step.

    ``options`` go to ``attach``.
    """

    def build(shape: Shape, dtype: torch.dtype) -> Step:
        config = AllocatorConfig(
            r_init=rank - 2 if growing else rank,
            r_target=rank,
            r_max=r_max,
            warmup_steps=2,
            growth_interval=4,
            growth_end=1000,
        )
        block, hidden = make_block(shape, dtype, "grouped_mm"), make_input(shape, dtype)
        adapter = drlora_torch.attach(block.train(), AllocatorEngine(config), **options)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            forward_backward(block, hidden)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


def peft(shape: Shape, dtype: torch.dtype) -> Step:
    from peft import LoraConfig, inject_adapter_in_model

    block, hidden = make_block(shape, dtype, "grouped_mm"), make_input(shape, dtype)
    model = nn.ModuleDict({"mlp": block})
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=32, target_parameters=targets), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        forward_backward(model["mlp"], hidden)
        optimizer.step()
        optimizer.zero_grad()

    return step


METHODS: dict[str, Callable[[Shape, torch.dtype], Step]] = {
    "frozen, grouped_mm": frozen("grouped_mm"),
    "frozen, eager": frozen("eager"),
    "drlora, growing": drlora(r_max=2 * RANK, growing=True),
    "drlora, static": drlora(r_max=2 * RANK, growing=False),
    "drlora, growing, r_max = r_target": drlora(r_max=RANK, growing=True),
    "drlora, growing, r_max = 4 r_target": drlora(r_max=4 * RANK, growing=True),
    "PEFT LoRA": peft,
}


def times(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of every method in every round, after a warm-up of three steps."""
    steps = {name: build(shape, dtype) for name, build in METHODS.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(rounds), description="rounds", console=Console(stderr=True)):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - started)
    return taken


def peaks(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """MiB that the third step of every method allocates at its peak."""
    found = {}
    for name, build in METHODS.items():
        step = build(shape, dtype)
        step()
        step()
        found[name] = memory.peak_bytes(step) / 2**20
    return found


def main(
    shape: Annotated[str, typer.Option(help="olmoe, qwen3 or small.")] = "olmoe",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 7,
) -> None:
    """Measure and write the table."""
    chosen, kind = SHAPES[shape], getattr(torch, dtype)
    taken, peak = times(chosen, kind, rounds), peaks(chosen, kind)
    first, second, *_ = taken.values()
    frozen_seconds = [min(pair) for pair in zip(first, second, strict=True)]
    frozen_peak = min(list(peak.values())[:2])
    rows = [
        [
            name,
            f"{statistics.median(seconds):.3f}",
            f"{median_ratio(seconds, frozen_seconds):.2f}",
            f"{median_ratio(seconds, taken['PEFT LoRA']):.2f}",
            f"{peak[name]:,.0f}",
            f"{peak[name] - frozen_peak:+,.0f}",
        ]
        for name, seconds in taken.items()
    ]
    columns = ["method", "s / step", "/ frozen", "/ PEFT", "peak MiB", "above frozen"]
    about = (
        f"{chosen}, {dtype}, rank {RANK}; medians of {rounds} interleaved rounds; frozen: the "
        "faster of the two, forward and backward to the inputs; the others: with AdamW (fused)."
    )
    report.write(f"expert_step_{shape}_{dtype}", about, columns, rows)


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(s / o for s, o in zip(seconds, others, strict=True))


if __name__ == "__main__":
    typer.run(main)
