"""The first steps of newborn rank dimensions.

A slot that changes owner starts with fresh optimizer state. An optimizer whose step depends on how
many steps it has made then treats the newborn rows wrongly: Adam's bias correction uses the
parameter's step count t, which is large, while their moments are as young as their own count n, so
at beta = (0.9, 0.999) the first updates are about 3 to 6 times too big. Newborn rows are moved as
the optimizer would with t = n, as far as drlora knows how; where it does not, it says so.

Shape letters: P rank slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from drlora_torch.lora import parts
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.lora.slots import IntArray
from drlora_torch.step.optimizers.adafactor import ADAFACTOR
from drlora_torch.step.optimizers.adam import ADAM, ADAMAX, RADAM
from drlora_torch.step.optimizers.correction import (
    Correction,
    Snapshot,
    count_steps,
    find_count,
    local_state,
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


@torch.no_grad()
def snapshot(loras: Iterable[ExpertLoRA], ages: Ages, optimizer: Optimizer) -> list[Snapshot]:
    """Keep the newborn rows that an optimizer is about to move; empty if none is corrected."""
    correction = _find_correction(optimizer)
    if correction is None:
        return []
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    kept = []
    for lora in loras:
        young = np.flatnonzero(ages[lora.name] != OLD)
        if not young.size:
            continue
        for parameter in lora.tensors().values():
            if parameter.grad is None or parameter not in groups:
                continue
            here, rows = parts.find_rows(parameter, young)
            counts = ages[lora.name][young[here]] + 1
            weights, gradient = parts.local(parameter), parts.local(parameter.grad)
            state = local_state(optimizer, parameter)
            copies = {k: state[k].index_select(0, rows) for k in correction.keep if k in state}
            values = weights.index_select(0, rows)
            group = groups[parameter]
            kept.append(Snapshot(parameter, weights, gradient, group, rows, values, counts, copies))
    if correction.before is not None:
        for each, t in zip(kept, count_steps(optimizer, kept), strict=True):
            correction.before(optimizer, each, t)
    return kept


@torch.no_grad()
def correct(snapshots: Sequence[Snapshot], optimizer: Optimizer) -> float:
    """Correct the step that the newborn rows have just made.

    Returns:
        Own steps after which rows need no correction any more; 0 if nothing was corrected.
    """
    correction = _find_correction(optimizer)
    if correction is None:
        return 0.0
    counts = zip(snapshots, count_steps(optimizer, snapshots), strict=True)
    return max((correction.after(optimizer, kept, t) for kept, t in counts), default=0.0)


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


def grow_older(ages: Ages, horizon: float) -> None:
    """Close an optimizer step in which rows were corrected; in place."""
    for slots in ages.values():
        slots[slots != OLD] += 1
        slots[slots > horizon] = OLD
