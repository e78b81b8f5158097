"""``python -m benchmarks.exchange``: what the processes tell each other in each step, and its cost.

Two processes of this machine with gloo. Sizes are those of real models, but for the features of the
experts, which do not travel.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import drlora_torch
from benchmarks.parity.launch import launch
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.adapter import state_of
from drlora_torch.step.exchange import send

ROUNDS = 15


class Size(NamedTuple):
    """A model of MoE layers: experts, and the features of an expert's projections together."""

    name: str
    layers: int
    experts: int
    features: int
    """Input and output features of gate_up_proj and down_proj."""


SIZES = (
    Size("OLMoE-1B-7B", 16, 64, 2048 + 2048 + 1024 + 2048),
    Size("61 layers of 384", 61, 384, 7168 + 4096 + 2048 + 7168),
)
RANK = 16


class Cost(NamedTuple):
    """Of one exchange."""

    size: Size
    sharded: bool
    numbers: int
    milliseconds: float
    ratio: float
    """Over the time of an all-reduce of as many numbers, median of interleaved rounds."""


def measure(folder: Path, alone: Any) -> list[Cost]:
    """Measure all sizes, for data parallelism and for sharded LoRA."""
    return [_measure(size, sharded) for size in SIZES for sharded in (False, True)]


def _measure(size: Size, sharded: bool) -> Cost:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    shape = OlmoeConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=4,
        num_hidden_layers=size.layers,
        num_attention_heads=2,
        num_experts=size.experts,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = OlmoeForCausalLM(shape)
    engine = AllocatorEngine(AllocatorConfig(r_init=RANK // 2, r_target=RANK))
    attached = state_of(drlora_torch.attach(model, engine))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    tables = {name: layer.lora.table for name, layer in attached.layers.items()}
    sums = {n: torch.rand(t.num_experts + 1, dtype=torch.float64) for n, t in tables.items()}
    slots = {n: torch.ones(t.num_slots, dtype=torch.float64) for n, t in tables.items()}
    numbers = sum(len(each) for each in sums.values()) + 4
    numbers += sum(len(each) for each in slots.values()) if sharded else 0
    plain = torch.zeros(numbers, dtype=torch.float64)
    ours, bare = [], []
    for _ in range(ROUNDS):
        ours.append(_time(lambda: send(attached, sums, slots).arrive()))
        bare.append(_time(lambda: distributed.all_reduce(plain)))
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    return Cost(size, sharded, numbers, 1e3 * statistics.median(ours), ratio)


def _time(call: Any) -> float:
    distributed.barrier()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    table = Table("model", "LoRA", "numbers", "MB", "ms", "over a bare all-reduce", "of gradients")
    for cost in launch(2, measure):
        size, megabytes = cost.size, 8e-6 * cost.numbers
        gradients = 4e-6 * size.layers * size.experts * RANK * size.features
        table.add_row(
            size.name,
            "sharded" if cost.sharded else "whole",
            f"{cost.numbers:,}",
            f"{megabytes:.2f}",
            f"{cost.milliseconds:.1f}",
            f"{cost.ratio:.2f}",
            f"{100 * megabytes / gradients:.3f} %",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
