"""Training steps of a case: frozen, with drlora, and with PEFT's LoRA on experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import drlora_torch
from benchmarks.methods import Training, plain
from benchmarks.on_device.shapes import Blocks, Case
from drlora_core import AllocatorConfig, AllocatorEngine

RANK = 16
R_MAX = 4 * RANK
EVENTS = 6  # until the budget is spent, all of them before the clock starts
LAST_STEP = 10_000  # later than any benchmark runs

FROZEN, AGAIN = "frozen", "frozen, again"
STATIC, GROWING, PEFT, NF4 = "static", "growing", "PEFT", "growing, NF4"
COMPILED, CHECKPOINTED = "growing, compiled", "growing, checkpointed"
FROZEN_COMPILED, FROZEN_CHECKPOINTED = "frozen, compiled", "frozen, checkpointed"


Prepare = Callable[[Blocks], Any]
"""Changes a model in place, or returns another to call."""


def frozen(case: Case, prepare: Prepare | None = None) -> Training:
    """Forward, and backward to the inputs, with the grouped experts of Transformers."""
    model = case.blocks()
    return _training(_prepared(model, prepare), case)


def drlora(
    case: Case,
    *,
    growing: bool,
    before: Prepare | None = None,
    after: Prepare | None = None,
    **options: Any,
) -> Training:
    """Forward, backward, statistics and AdamW.

    A growing one starts at half the rank; real events have grown it before this returns. So ranks
    are uneven, slots are scattered and half of the rank dimensions are newborn, as in most of a
    run. ``before`` and ``after`` change the model around ``attach``.
    """
    start = RANK // 2 if growing else RANK
    config = AllocatorConfig(
        r_init=start,
        r_target=RANK,
        r_max=R_MAX,
        warmup_steps=0,
        growth_interval=1 if growing else LAST_STEP,
        growth_end=EVENTS if growing else LAST_STEP,
        quota=max(1, math.ceil(case.shape.experts * (RANK - start) / EVENTS)),
    )
    model = case.blocks()
    if before is not None:
        before(model)
    adapter = drlora_torch.attach(model, AllocatorEngine(config), **options)
    optimizer = AdamW(adapter.parameters(), lr=1e-4, fused=True)
    few = _training(model, case, optimizer, adapter, tokens=min(64, case.tokens))
    for _ in range(EVENTS + 1 if growing else 2):
        few()
    return _training(_prepared(model, after), case, optimizer, adapter)


def peft(case: Case) -> Training:
    """PEFT's LoRA on the same experts at the same rank, by ``get_peft_model``."""
    from peft import LoraConfig, get_peft_model

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_parameters=targets)
    model = get_peft_model(case.blocks(), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _training(model, case, AdamW(trained, lr=1e-4, fused=True))


def _training(
    model: nn.Module,
    case: Case,
    optimizer: Optimizer | None = None,
    adapter: drlora_torch.Adapter | None = None,
    tokens: int | None = None,
) -> Training:
    hidden = case.hidden(tokens)
    return Training(hidden, plain(model, hidden), optimizer, adapter)


def _prepared(model: Blocks, prepare: Prepare | None) -> nn.Module:
    """What a training calls."""
    returned = None if prepare is None else prepare(model)
    return model if returned is None else returned


def compiled(model: Blocks) -> nn.Module:
    """With inductor on a GPU; on a CPU, where it would need a compiler, only as one graph."""
    backend = "inductor" if next(model.parameters()).device.type == "cuda" else "aot_eager"
    found: nn.Module = torch.compile(model, backend=backend, fullgraph=True)
    return found


def checkpointing(model: Blocks) -> None:
    """Recompute each block in the backward pass."""
    model.checkpointing = True


def main_methods() -> dict[str, Callable[[Case], Training]]:
    """What is compared at every shape, as far as the packages are there."""
    found: dict[str, Callable[[Case], Training]] = {
        FROZEN: frozen,
        AGAIN: frozen,
        STATIC: lambda case: drlora(case, growing=False),
        GROWING: lambda case: drlora(case, growing=True),
    }
    if find_spec("bitsandbytes") is not None:
        found[NF4] = lambda case: drlora(case, growing=True, before=drlora_torch.quantize_experts)
    if find_spec("peft") is not None:
        found[PEFT] = peft
    return found


def other_methods() -> dict[str, Callable[[Case], Training]]:
    """With compilation and with checkpointing."""
    return {
        FROZEN: frozen,
        GROWING: lambda case: drlora(case, growing=True),
        FROZEN_COMPILED: lambda case: frozen(case, compiled),
        COMPILED: lambda case: drlora(case, growing=True, after=compiled),
        FROZEN_CHECKPOINTED: lambda case: frozen(case, checkpointing),
        CHECKPOINTED: lambda case: drlora(case, growing=True, after=checkpointing),
    }
