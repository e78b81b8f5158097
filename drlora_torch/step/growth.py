"""Carry out a growth event: slots are given to experts, or freed, and start clean."""

from __future__ import annotations

import numpy as np
from torch.optim import Optimizer

from drlora_core import GrowthEvent
from drlora_core.errors import LayoutError
from drlora_torch.attached import Attached
from drlora_torch.lora import parts
from drlora_torch.lora.slots import Born
from drlora_torch.step.hooks import count_held
from drlora_torch.step.newborn import OLD
from drlora_torch.step.optimizers.codes import is_quantized
from drlora_torch.step.optimizers.fresh import check_state, clear_state
from drlora_torch.step.optimizers.names import is_tested
from drlora_torch.step.parameters import lora_parameters


def carry_out(attached: Attached, event: GrowthEvent) -> None:
    """Change the slots of all layers as the engine has decided; see :func:`check_event` first."""
    groups = [group for optimizer in attached.optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for name, layer in attached.layers.items():
        lora, ages = layer.lora, attached.ages[name]
        freed, growth = np.zeros(0, dtype=np.int64), event.deltas[name]
        if name in event.cut:
            freed = lora.table.cut(event.cut[name])
            lora.clear(freed)
            ages[freed] = OLD
            growth = growth + event.cut[name].sum(axis=1)
        born = lora.table.grow(growth)
        lora.birth(_number(attached, name, born, event))
        ages[born.slots] = 0
        changed = np.union1d(freed, born.slots)  # a slot may be freed and given to another
        if not changed.size:
            continue
        rows = parts.HeldRows(changed)
        for parameter in lora.matrices():
            for optimizer in attached.optimizers:
                clear_state(optimizer, parameter, rows)
            if id(parameter) not in held:
                attached.missed.append((parameter, changed))
    attached.events.append(event)
    check_ranks(attached)


def _number(attached: Attached, name: str, born: Born, event: GrowthEvent) -> Born:
    """Number newborn dimensions by how many their expert has had before, cut ones included.

    Its row of A is drawn by this number. By its position it could be the row that a dimension which
    has moved down still holds.
    """
    cuts = [past.cut[name].sum(axis=1) for past in (*attached.events, event) if name in past.cut]
    if not cuts:
        return born
    return born._replace(positions=born.positions + sum(cuts)[born.experts])


def meet_optimizer(attached: Attached, optimizer: Optimizer) -> None:
    """Follow an optimizer from before its first step on.

    Its state may have been loaded, and events may have happened since, while another optimizer
    stepped: rows that have changed owner are fresh in it too.
    """
    if optimizer in attached.optimizers:
        return
    attached.optimizers.add(optimizer)
    mine = [each for each in attached.missed if count_held(optimizer, [each[0]])]
    attached.missed[:] = [each for each in attached.missed if not count_held(optimizer, [each[0]])]
    for parameter, changed in mine:
        clear_state(optimizer, parameter, parts.HeldRows(changed))


def hold_free_slots(attached: Attached, optimizer: Optimizer) -> None:
    """Keep free slots at zero where the optimizer may move them.

    The CPU code of bitsandbytes (0.50) rounds a state of zero to the fifth smallest of its codes,
    next to larger values in the same block, so rows that never had a gradient drift. Optimizers
    that nobody has tested may start their averages with another number than zero.
    """
    tested = is_tested(optimizer)
    for layer in attached.layers.values():
        on_cpu = [p for p in layer.lora.matrices() if p.device.type == "cpu"]
        drifting = [p for p in on_cpu if is_quantized(optimizer, p)]
        if tested and not drifting:
            continue
        layer.lora.hold_free_slots()
        free = layer.lora.free_slots()
        for parameter in drifting:
            clear_state(optimizer, parameter, parts.HeldRows(free))


def check_optimizer(attached: Attached, optimizer: Optimizer) -> None:
    """Refuse state that no event could reset, as long as an event is to come."""
    if (
        attached.engine.config.ranks_change
        and attached.engine.step_count < _growth_steps(attached)[-1]
    ):
        check_state(optimizer, lora_parameters(attached))


def check_event(attached: Attached) -> None:
    """Refuse to close a step with an event that some optimizer's state does not allow.

    The engine has not decided yet, so it stays in step with the slots.
    """
    if may_follow(attached):
        check_ranks(attached)
        for optimizer in attached.optimizers:
            check_state(optimizer, lora_parameters(attached))


def check_ranks(attached: Attached) -> None:
    """Refuse to go on with layers that have lost step with the engine; only the host is asked.

    Raises:
        LayoutError: a layer holds other ranks than the engine.
    """
    for name, layer in attached.layers.items():
        if (layer.lora.table.ranks() != attached.engine.ranks(name)).any():
            raise LayoutError(
                f"layer {name!r} holds other ranks than the engine (was a growth event "
                "interrupted?); go on from the last file that was saved"
            )


def may_follow(attached: Attached) -> bool:
    """True if the step that is not closed yet may end with an event."""
    changes = attached.engine.config.ranks_change
    return changes and attached.engine.step_count + 1 in _growth_steps(attached)


def _growth_steps(attached: Attached) -> tuple[int, ...]:
    return attached.engine.config.growth_steps
