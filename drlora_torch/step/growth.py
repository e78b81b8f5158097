"""Carry out a growth event: slots are given to experts, or freed, and start clean.

Shape letters: P rank slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_core import GrowthEvent
from drlora_torch.attached import Attached
from drlora_torch.lora.slots import IntArray
from drlora_torch.step.newborn import OLD


def carry_out(attached: Attached, event: GrowthEvent) -> None:
    """Change the slots of all layers as the engine has decided."""
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
        for optimizer in attached.optimizers:
            for parameter in lora.parameters():
                clear_state(optimizer, parameter, changed)
    attached.events.append(event)


@torch.no_grad()
def clear_state(optimizer: Optimizer, parameter: nn.Parameter, slots: IntArray) -> None:
    """Zero the state that an optimizer keeps for rows of a parameter [P, ...].

    Per-row state has the parameter's number of axes and P rows (Adam, SGD, torch's Adafactor), or
    is the row factor of Transformers' Adafactor.
    """
    index = torch.from_numpy(slots).to(parameter.device)
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        same_rows = value.shape[0] == parameter.shape[0]
        if same_rows and (value.dim() == parameter.dim() or key == "exp_avg_sq_row"):
            value[index] = 0
