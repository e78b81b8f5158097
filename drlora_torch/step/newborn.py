"""The first steps of newborn rank dimensions.

A slot that changes owner starts with fresh optimizer state. An optimizer whose step depends on how
many steps it has made then treats the newborn rows wrongly: Adam's bias correction uses the
parameter's step count t, which is large, while their moments are as young as their own count n, so
at beta = (0.9, 0.999) the first updates are about 3 to 6 times too big. Newborn rows are moved as
the optimizer would with t = n, as far as drlora knows how; where it does not, it says so.

Shape letters: P rank slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drlora_torch.lora import parts
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.lora.slots import IntArray
from drlora_torch.step.optimizers.adafactor import ADAFACTOR
from drlora_torch.step.optimizers.adam import ADAM, ADAMAX, RADAM
from drlora_torch.step.optimizers.correction import (
    GROWN,
    Correction,
    Snapshot,
    count_steps,
    find_count,
)
from drlora_torch.step.optimizers.names import TORCHAO, algorithm, class_names
from drlora_torch.step.optimizers.schedule_free import SCHEDULE_FREE

OLD = -1  # age of a slot that needs no correction

Ages = Mapping[str, IntArray]
"""Optimizer steps that each slot [P] has lived, by layer; OLD where nothing is corrected."""

CORRECTIONS: Mapping[str, Correction] = {
    "torch.Adam": ADAM,  # AdamW is a subclass
    TORCHAO: ADAM,
    "bitsandbytes adam": ADAM,
    "torch.Adamax": ADAMAX,
    "torch.RAdam": RADAM,
    "torch.Adafactor": ADAFACTOR,
    "transformers.Adafactor": ADAFACTOR,
    "schedulefree.AdamWScheduleFree": SCHEDULE_FREE,
    "schedulefree.RAdamScheduleFree": SCHEDULE_FREE,
    "schedulefree.SGDScheduleFree": SCHEDULE_FREE,
}
"""By optimizer, subclasses included."""
NOT_NEEDED = frozenset(
    {
        *("torch.SGD", "torch.RMSprop", "torch.Rprop", "torch.Adagrad", "torch.Adadelta"),
        *("torch.ASGD", "lion_pytorch.Lion"),
        *("bitsandbytes lion", "bitsandbytes momentum", "bitsandbytes rmsprop"),
        "bitsandbytes adagrad",
    }
)
"""Optimizers that do not correct their averages for bias: a row with fresh state moves as in a
fresh optimizer, whatever the step. Lion takes only the sign of its average, so bias cannot matter.
Step sizes that shrink with the step by design (ASGD, Adagrad's ``lr_decay``) do so for newborn rows
too."""
REASONS: Mapping[str, str] = {
    "torch.Muon": "it mixes the rows of a matrix in each update, and has no bias correction",
    "torch.NAdam": "its schedule of momentum belongs to the whole parameter",
    "bitsandbytes ademamix": "it adds an average with bias correction and one without",
    "bitsandbytes lamb": "it scales the step of the whole parameter",
    "bitsandbytes lars": "it scales the step of the whole parameter",
}
"""Why newborn rows are not corrected, by optimizer."""


@dataclasses.dataclass(slots=True, eq=False)
class _YoungRows:
    """Newborn rows of one layer."""

    lora: ExpertLoRA
    held: parts.HeldRows
    counts: Tensor
    """Own step count of each in the coming step, float64 [newborn] on the device of the LoRA; GROWN
    where it no longer matters."""


class Young:
    """The newborn rows of an adapter as the devices know them, from one event to the next.

    Rows are uploaded once, and their step counts advance on the device. The ages on the host are
    those of the last step that has arrived there.
    """

    def __init__(self, loras: Iterable[ExpertLoRA], ages: Ages) -> None:
        self._layers: list[_YoungRows] = []
        self._most = 0  # no count is larger
        for lora in loras:
            slots = np.flatnonzero(ages[lora.name] != OLD)
            if slots.size:
                counts = torch.from_numpy(ages[lora.name][slots] + 1.0).to(lora.device)
                self._layers.append(_YoungRows(lora, parts.HeldRows(slots), counts))
                self._most = max(self._most, int(ages[lora.name].max()) + 1)

    @torch.no_grad()
    def snapshot(self, optimizer: Optimizer) -> list[Snapshot]:
        """Keep the rows that an optimizer is about to move; empty if none is corrected."""
        correction = _find_correction(optimizer) if self._layers else None
        if correction is None:
            return []
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        kept = [
            _snapshot(optimizer, groups[parameter], parameter, layer, correction.keep)
            for layer in self._layers
            for parameter in layer.lora.tensors().values()
            if parameter.grad is not None and parameter in groups
        ]
        if correction.before is not None:
            for each, t in zip(*count_steps(optimizer, kept), strict=True):
                correction.before(optimizer, each, t)
        return kept

    @torch.no_grad()
    def advance(self, idle: Tensor | None, horizon: float) -> None:
        """Close an optimizer step, unless a device says that it was none, bool [].

        Rows that have lived more than ``horizon`` steps are moved as the optimizer moves them, also
        before the host knows that they have.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for layer in self._layers:
            by_device.setdefault(layer.counts.device, []).append(layer.counts)
        self._most += 1
        for device, counts in by_device.items():
            if idle is None:
                torch._foreach_add_(counts, 1.0)
            else:
                torch._foreach_add_(counts, [(~idle).to(device, torch.float64)] * len(counts))
            for each in counts if self._most - 1 > horizon else ():
                each.masked_fill_(each - 1.0 > horizon, GROWN)

    def retire(self, ages: Ages) -> None:
        """Let go of rows that need no correction any more."""
        for layer in self._layers:
            slots = layer.held.wanted
            young = np.flatnonzero(ages[layer.lora.name][slots] != OLD)
            if young.size < slots.size:
                layer.held = parts.HeldRows(slots[young])
                stay = torch.from_numpy(young).to(layer.counts.device)
                layer.counts = layer.counts.index_select(0, stay)
        self._layers = [layer for layer in self._layers if layer.held.wanted.size]


def _snapshot(
    optimizer: Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
    layer: _YoungRows,
    keep: Iterable[str],
) -> Snapshot:
    here, rows = layer.held.of(parameter)
    if layer.counts.device != rows.device:  # the model has moved
        layer.counts = layer.counts.to(rows.device)
    counts = layer.counts if here is None else layer.counts.index_select(0, here)
    assert parameter.grad is not None
    weights, gradient = parts.local(parameter), parts.local(parameter.grad)
    state = optimizer.state.get(parameter, {})
    copies = {key: parts.local(state[key]).index_select(0, rows) for key in keep if key in state}
    values = weights.index_select(0, rows)
    return Snapshot(parameter, weights, gradient, group, rows, values, counts, copies)


@torch.no_grad()
def correct(
    snapshots: Sequence[Snapshot], optimizer: Optimizer, skipped: Tensor | None = None
) -> float:
    """Correct the step that the newborn rows have just made.

    Args:
        snapshots: of before the step.
        optimizer: which has made it.
        skipped: True if it has left all parameters as they were, bool []; None: it has not.

    Returns:
        Own steps after which rows need no correction any more; 0 if nothing was corrected.
    """
    correction = _find_correction(optimizer) if snapshots else None
    if correction is None:
        return 0.0
    counted, counts = count_steps(optimizer, snapshots)
    return correction.after(optimizer, counted, counts, skipped) if counted else 0.0


def find_obstacle(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> str | None:
    """Why newborn rows are not corrected under an optimizer; None if they are, or need not be."""
    names = _names(optimizer)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    held = [p for p in parameters if p in groups]
    if _find_correction(optimizer) is not None:
        moved = [p for p in held if optimizer.state.get(p)]
        if any(find_count(optimizer, p, groups[p]) is None for p in moved):
            return "it keeps no step count where Adam does"
        return "it keeps no state where Adam does" if held and not moved else None
    if any("z" in optimizer.state.get(p, {}) for p in held) and _is_of_torch(names):
        return "a schedule-free wrapper averages all rows with the weight of their common step"
    if any(groups[p].get("dampening") and groups[p].get("momentum") for p in held):
        return "with dampening, only the optimizer's first step counts its gradient in full"
    if not NOT_NEEDED.isdisjoint(names):
        return None
    told = [REASONS[name] for name in names if name in REASONS]
    return told[0] if told else "drlora does not know how its steps depend on their number"


def _find_correction(optimizer: Optimizer) -> Correction | None:
    found = (CORRECTIONS[name] for name in _names(optimizer) if name in CORRECTIONS)
    return next(found, None)


def _is_of_torch(names: Iterable[str]) -> bool:
    return any(name.startswith("torch.") for name in names if name != "torch.Optimizer")


def _names(optimizer: Optimizer) -> tuple[str, ...]:
    """What the tables call an optimizer, and what it derives from."""
    return (f"bitsandbytes {algorithm(optimizer)}", *class_names(type(optimizer)))


def grow_older(ages: Ages, horizon: float) -> bool:
    """Close an optimizer step in which rows were corrected; in place. True if some have retired."""
    retired = False
    for slots in ages.values():
        slots[slots != OLD] += 1
        grown_up = slots > horizon
        slots[grown_up] = OLD
        retired |= bool(grown_up.any())
    return retired
