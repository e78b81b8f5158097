"""Training steps of MoE blocks: frozen, with drlora, and with PEFT's LoRA on experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import drlora_torch
from benchmarks.blocks import Case
from drlora_core import AllocatorConfig, AllocatorEngine

RANK = 16
EVENT_EVERY = 2  # steps from one growth event to the next
EVENTS_TO_BUDGET = 6  # events until the budget is spent; all but the last before any timing
FEW_TOKENS = 8  # tokens of the untimed steps that grow the ranks
LAST_STEP = 10_000  # later than any benchmark runs

Action = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Training:
    """One method on one case; call it to take a step."""

    hidden: Tensor
    backward: Action
    """Forward and backward."""
    optimizer: Optimizer | None = None
    """None if nothing is trained."""
    adapter: drlora_torch.Adapter | None = None

    def __call__(self) -> None:
        self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Bytes of trained weights, gradients and optimizer state, after a step."""
        if self.optimizer is None:
            return 0
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [v for p in trained for v in self.optimizer.state[p].values()]
        return 2 * sum(p.nbytes for p in trained) + sum(v.nbytes for v in states)

    def table_bytes(self) -> int:
        """Bytes of the owner tables of all layers."""
        layers = self.adapter.layers.values() if self.adapter is not None else ()
        tables = [layer.lora.table for layer in layers]
        return sum(table.owner.nbytes + table.position.nbytes for table in tables)


Builder = Callable[[Case], Training]
Runner = Callable[[nn.Module, Tensor], Action]
"""Makes the forward and backward of a step, given a model and its input."""


def plain(model: nn.Module, hidden: Tensor) -> Action:
    """Forward, and backward including the inputs."""

    def run() -> None:
        hidden.grad = None
        output = model(hidden)
        output.backward(torch.ones_like(output))

    return run


def as_it_is(model: nn.Module) -> None:
    """Change nothing."""


def frozen(implementation: str, prepare: Callable[[nn.Module], object] = as_it_is) -> Builder:
    """The frozen model, with an experts implementation of Transformers."""

    def build(case: Case) -> Training:
        hidden, model = case.hidden(), case.blocks(implementation)
        prepare(model)
        return Training(hidden, plain(model, hidden))

    return build


def drlora(
    *,
    r_max: int,
    growing: bool,
    rank: int = RANK,
    runner: Runner = plain,
    prepare: Callable[[nn.Module], object] = as_it_is,
    **options: Any,
) -> Builder:
    """Forward, backward, statistics and AdamW.

    With ``growing``, training starts at half the rank, and real events grow the ranks before the
    builder returns. So ranks are uneven, slots are scattered, and half of the rank dimensions are
    newborn, as in most of a run. The event at the second step spends the rest of the budget; later
    events only decide. ``options`` are passed to ``attach``.
    """

    def build(case: Case) -> Training:
        start = rank // 2 if growing else rank
        missing = case.shape.experts * (rank - start)
        config = AllocatorConfig(
            r_init=start,
            r_target=rank,
            r_max=r_max,
            warmup_steps=0,
            growth_interval=EVENT_EVERY,
            growth_end=LAST_STEP,
            quota=max(1, math.ceil(missing / EVENTS_TO_BUDGET)),
        )
        model, hidden = case.blocks(), case.hidden()
        prepare(model)
        adapter = drlora_torch.attach(model, AllocatorEngine(config), **options)
        optimizer = AdamW(adapter.parameters(), lr=1e-4, fused=True)
        if growing:
            few = case.hidden(min(FEW_TOKENS, case.shape.tokens))
            grow = Training(few, plain(model, few), optimizer)
            for _ in range(EVENT_EVERY * (EVENTS_TO_BUDGET - 1)):
                grow()
        return Training(hidden, runner(model, hidden), optimizer, adapter)

    return build


def peft(case: Case) -> Training:
    """PEFT's LoRA on the same experts at the same rank, by ``get_peft_model``."""
    from peft import LoraConfig, get_peft_model

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_parameters=targets)
    model, hidden = get_peft_model(case.blocks(), config), case.hidden()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Training(hidden, plain(model, hidden), AdamW(trained, lr=1e-4, fused=True))


FROZEN, AGAIN, EAGER = "frozen, grouped_mm", "frozen, grouped_mm, again", "frozen, eager"
DYNAMIC, STATIC = "drlora, dynamic", "drlora, static"
LOW_MAX, HIGH_MAX = "drlora, dynamic, r_max = r_target", "drlora, dynamic, r_max = 4 r_target"
PEFT = "PEFT LoRA"

METHODS: dict[str, Builder] = {
    FROZEN: frozen("grouped_mm"),
    AGAIN: frozen("grouped_mm"),
    EAGER: frozen("eager"),
    DYNAMIC: drlora(r_max=2 * RANK, growing=True),
    STATIC: drlora(r_max=2 * RANK, growing=False),
    LOW_MAX: drlora(r_max=RANK, growing=True),
    HIGH_MAX: drlora(r_max=4 * RANK, growing=True),
    PEFT: peft,
}
