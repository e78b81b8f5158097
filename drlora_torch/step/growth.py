"""Carry out a growth event: slots are given to experts, or freed, and start clean."""

from __future__ import annotations

import numpy as np
from torch.optim import Optimizer

from drlora_core import GrowthEvent
from drlora_torch.attached import Attached
from drlora_torch.lora.slots import FREE
from drlora_torch.step.newborn import OLD
from drlora_torch.step.optimizers.codes import is_quantised
from drlora_torch.step.optimizers.fresh import check_state, clear_state
from drlora_torch.step.parameters import lora_parameters


def carry_out(attached: Attached, event: GrowthEvent) -> None:
    """Change the slots of all layers as the engine has decided."""
    if any(delta.any() for delta in event.deltas.values()):
        for optimizer in attached.optimizers:  # before anything changes
            check_state(optimizer, lora_parameters(attached))
    for name, layer in attached.layers.items():
        lora, ages = layer.lora, attached.ages[name]
        if name in event.cut:
            changed = lora.table.cut(event.cut[name])
            lora.clear(changed)
            ages[changed] = OLD
        else:
            born = lora.table.grow(event.deltas[name])
            lora.birth(born)
            changed = born.slots
            ages[changed] = 0
        if not changed.size:
            continue
        for optimizer in attached.optimizers:
            for parameter in lora.parameters():
                clear_state(optimizer, parameter, changed)
    attached.events.append(event)


def hold_free_slots(attached: Attached, optimizer: Optimizer) -> None:
    """Keep free slots at zero where the optimizer would move them.

    The CPU code of bitsandbytes (0.50) rounds a state of zero to the fifth smallest of its codes,
    next to larger values in the same block, so rows that never had a gradient drift.
    """
    for layer in attached.layers.values():
        free = np.flatnonzero(layer.lora.table.owner == FREE)
        moved = [p for p in layer.lora.parameters() if is_quantised(optimizer, p)]
        if free.size and moved:
            for _, projection in layer.lora.items():
                projection.clear(free)
            for parameter in moved:
                clear_state(optimizer, parameter, free)


def check_optimizer(attached: Attached, optimizer: Optimizer) -> None:
    """Refuse state that no event could reset, as long as an event is to come."""
    config = attached.engine.config
    if config.starting_rank == config.r_target:
        return  # the ranks never change
    if attached.engine.step_count < config.growth_steps[-1]:
        check_state(optimizer, lora_parameters(attached))
