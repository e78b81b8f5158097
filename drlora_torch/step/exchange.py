"""What a step tells the host: the statistics of all layers in one flat tensor and one copy.

Several processes sum it before, on the device, in one all-reduce.

Each has counted its own tokens. Gradients are averaged by whatever trains the model, so importance
is the same everywhere; but where rows of A and B are spread over processes, each has read that of
its own rows.

Shape letters: N experts, P rank slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.lora import parts
from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.models.sharding import count_copies
from drlora_torch.step import agreement
from drlora_torch.step.parameters import lora_parameters
from drlora_torch.step.processes import count_processes, sum_over_processes
from drlora_torch.step.readback import Readback

Arrays = dict[str, NDArray[np.float64]]
Consume = Callable[[NDArray[np.float64]], None]
"""Takes values that a forward has sent to the host."""
Note = tuple[Tensor, Consume]
"""Values of a forward, [n] on its device, and what takes them on the host."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Statistics:
    """What the host knows of a step, of all processes together."""

    routing: Arrays
    """Summed routing weights of each expert, then the number of tokens, [N + 1] by layer."""
    importance: Arrays
    """Of each slot, [P] by layer."""
    idle: bool
    """True if the optimizer has left the parameters as they were (``found_inf``)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sent:
    """The statistics of a step on their way to the host."""

    readback: Readback
    sizes: Sequence[int]
    """Of the parts of the flat tensor: probe, idle, routing and importance by layer, notes."""
    names: Sequence[str]
    notes: Sequence[Consume]

    def arrive(self) -> Statistics:
        """Wait for them if need be, and hand the notes to those who take them.

        Raises:
            AttachError: the processes train apart.
            ModelError: a forward has noted that its block is not as it was declared.
        """
        parts_of = np.split(self.readback.values(), np.cumsum(self.sizes)[:-1])
        probe, idle, *found = parts_of
        agreement.check(probe)
        count = len(self.names)
        for consume, values in zip(self.notes, found[2 * count :], strict=True):
            consume(values)
        return Statistics(
            routing=dict(zip(self.names, found[:count], strict=True)),
            importance=dict(zip(self.names, found[count : 2 * count], strict=True)),
            idle=bool(idle[0]),
        )


def _copies_of_batch(attached: Attached, lora: ExpertLoRA, processes: int) -> int:
    """How many of the processes train on the same tokens."""
    if lora.spread is not None:
        return lora.spread.copies
    mesh: Any = getattr(lora.some, "device_mesh", None)
    return count_copies(attached.model, processes) if mesh is None else processes // mesh.size()


def _holders_of_row(lora: ExpertLoRA, processes: int) -> int:
    """How many of the processes hold, and read, the same row; 1 where it is not exchanged."""
    some = lora.some
    return processes // parts.num_parts(some) if parts.is_sharded(some) else 1


@torch.no_grad()
def send(
    attached: Attached,
    sums: Mapping[str, Tensor],
    slots: Mapping[str, Tensor],
    idle: Tensor | None = None,
    notes: Sequence[Note] = (),
) -> Sent:
    """Sum the statistics of a step over all processes, and send them to the host.

    Nothing waits, but for an all-reduce that itself waits (gloo).

    Args:
        attached: the adapter.
        sums: routing weights and the number of tokens, float64 [N + 1] by layer; a layer may be
            missing.
        slots: importance of the rows that are here, float64 [P] by layer, 0 for others.
        idle: True where the optimizer has left the parameters as they were, bool []; None: it has
            not.
        notes: values of this process for the host.
    """
    loras = {name: layer.lora for name, layer in attached.layers.items()}
    device = next(iter(loras.values())).compute_device
    several = count_processes(attached.process_group)
    none = torch.zeros(1, dtype=torch.float64, device=device)
    counted, read = [], []
    for name, lora in loras.items():
        own = sums.get(name)
        own = none.expand(lora.table.num_experts + 1) if own is None else own.to(device)
        counted.append(_divide(own, _copies_of_batch(attached, lora, several)))
        read.append(_divide(slots[name].to(device), _holders_of_row(lora, several)))
    flag = none if idle is None else idle.to(none).reshape(1)
    shared = [agreement.probe(attached, read, device), flag, *counted]
    values = [each.to(none).reshape(-1) for each, _ in notes]
    if sharded := any(map(parts.is_sharded, lora_parameters(attached))):
        shared += read
    flat = sum_over_processes(torch.cat(shared), attached.process_group)
    if rest := [*(() if sharded else read), *values]:
        flat = torch.cat([flat, *rest])
    return Sent(
        readback=Readback(flat),
        sizes=[agreement.SIZE, 1, *(len(each) for each in (*counted, *read, *values))],
        names=list(loras),
        notes=[consume for _, consume in notes],
    )


def _divide(values: Tensor, by: int) -> Tensor:
    return values if by == 1 else values / by
