"""Carry out a growth event: slots are given to experts, or freed, and start clean."""

from __future__ import annotations

from drlora_core import GrowthEvent
from drlora_torch.attached import Attached
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.lora.slots import IntArray
from drlora_torch.step.newborn import OLD
from drlora_torch.step.optimizer_state import clear_state


def carry_out(attached: Attached, event: GrowthEvent) -> None:
    """Change the slots of all layers as the engine has decided."""
    for name, layer in attached.layers.items():
        lora, ages = layer.lora, attached.ages[name]
        if name in event.cut:
            freed = lora.table.cut(event.cut[name])
            lora.clear(freed)
            _clear_state(attached, lora, freed)
            ages[freed] = OLD
        else:
            born = lora.table.grow(event.deltas[name])
            lora.birth(born)
            _clear_state(attached, lora, born.slots)
            ages[born.slots] = 0
    attached.events.append(event)


def _clear_state(attached: Attached, lora: ExpertLoRA, slots: IntArray) -> None:
    for optimizer in attached.optimizers if slots.size else ():
        for parameter in lora.parameters():
            clear_state(optimizer, parameter, slots)
