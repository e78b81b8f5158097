"""Time of a growth event of a large model."""

from __future__ import annotations

import statistics
import time

import torch
from torch.optim import AdamW

import drlora_torch
from benchmarks.methods import Training, plain
from benchmarks.on_device.methods import RANK
from benchmarks.on_device.shapes import Blocks, Case, Shape
from drlora_core import AllocatorConfig, AllocatorEngine

EVENTS = 8


def milliseconds(shape: Shape, layers: int, device: torch.device, dtype: torch.dtype) -> float:
    """What a step with an event and the one behind it take longer, the median of all events.

    The latter uploads what has changed.

    All layers have the same frozen weights, since an event does not touch them.
    """
    case = Case(shape, 64, 1, device, dtype)
    blocks = [case.blocks().layers[0] for _ in range(layers)]
    model = Blocks(blocks).requires_grad_(False).train()
    config = AllocatorConfig(
        r_init=RANK // 2, r_target=RANK, r_max=4 * RANK, warmup_steps=0, growth_interval=3,
        growth_end=3 * EVENTS,
    )  # fmt: skip
    adapter = drlora_torch.attach(model, AllocatorEngine(config))
    optimizer = AdamW(adapter.parameters(), lr=1e-4, fused=True)
    hidden = case.hidden()
    training = Training(hidden, plain(model, hidden), optimizer, adapter)
    seconds = []
    for _ in range(3 * EVENTS + 1):
        _wait(device)
        started = time.perf_counter()
        training()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    assert len(adapter.events) == EVENTS
    # the first event compiles kernels
    return 1e3 * statistics.median(
        seconds[3 * k + 2] + seconds[3 * k + 3] - 2 * seconds[3 * k + 1] for k in range(1, EVENTS)
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
