"""What processes tell each other at the end of a step: one sum, and one copy to the host.

Each has counted its own tokens. Gradients are averaged by whatever trains the model, so importance
is the same everywhere; but where rows of A and B are spread over processes, each has read that of
its own rows.

Shape letters: N experts, P rank slots.
"""

from __future__ import annotations

from collections.abc import Mapping
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

Arrays = dict[str, NDArray[np.float64]]


def _copies_of_batch(attached: Attached, lora: ExpertLoRA, processes: int) -> int:
    """How many of the processes train on the same tokens."""
    if lora.spread is not None:
        return lora.spread.copies
    mesh: Any = getattr(next(lora.parameters()), "device_mesh", None)
    return count_copies(attached.model, processes) if mesh is None else processes // mesh.size()


def _holders_of_row(lora: ExpertLoRA, processes: int) -> int:
    """How many of the processes hold, and read, the same row; 1 where it is not exchanged."""
    some = next(lora.parameters())
    return processes // parts.num_parts(some) if parts.is_sharded(some) else 1


@torch.no_grad()
def exchange(
    attached: Attached, sums: Mapping[str, Tensor], slots: Mapping[str, Tensor]
) -> tuple[Arrays, Arrays]:
    """Sum the statistics of a step over all processes.

    Args:
        attached: the adapter.
        sums: routing weights and the number of tokens, float64 [N + 1] by layer; a layer may be
            missing.
        slots: importance of the rows that are here, float64 [P] by layer, 0 for others.

    Returns:
        Both of all processes: [N + 1] and [P] by layer.

    Raises:
        AttachError: the processes train apart.
    """
    loras = {name: layer.lora for name, layer in attached.layers.items()}
    device = next(iter(loras.values())).compute_device
    several = count_processes(attached.process_group)
    counted, read = [], []
    for name, lora in loras.items():
        none = torch.zeros(lora.table.num_experts + 1, dtype=torch.float64)
        copies = _copies_of_batch(attached, lora, several)
        counted.append(sums.get(name, none).to(device) / copies)
        read.append(slots[name].to(device) / _holders_of_row(lora, several))
    shared = [agreement.probe(attached, read).to(device), *counted]
    if sharded := any(map(parts.is_sharded, lora_parameters(attached))):
        shared += read
    summed = sum_over_processes(torch.cat(shared), attached.process_group)
    values = torch.cat([summed, *(() if sharded else read)]).cpu().numpy()
    sizes = [agreement.SIZE, *(len(each) for each in (*counted, *read))]
    probe, *found = np.split(values, np.cumsum(sizes)[:-1])
    agreement.check(probe)
    routing, importance = found[: len(loras)], found[len(loras) :]
    return dict(zip(loras, routing, strict=True)), dict(zip(loras, importance, strict=True))
