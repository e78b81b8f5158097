"""What processes tell each other at the end of a step, in one sum.

Each has counted its own tokens. Gradients are averaged by whatever trains the model, so importance
is the same everywhere; but where rows of A and B are spread over processes, each has read that of
its own rows.

Shape letters: N experts, P rank slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.lora import parts
from drlora_torch.step import agreement
from drlora_torch.step.parameters import lora_parameters
from drlora_torch.step.processes import sum_over_processes

Arrays = dict[str, NDArray[np.float64]]


def exchange(
    attached: Attached, sums: Mapping[str, NDArray[np.float64]], slots: Mapping[str, Tensor]
) -> tuple[Arrays, Arrays]:
    """Sum the statistics of a step over all processes.

    Args:
        attached: the adapter.
        sums: routing weights and the number of tokens, [N + 1] by layer; a layer may be missing.
        slots: importance of the rows that are here, [P] by layer, 0 for others.

    Returns:
        Both of all processes: [N + 1] and [P] by layer.

    Raises:
        AttachError: the processes train apart.
    """
    loras = {name: layer.lora for name, layer in attached.layers.items()}
    importance = {name: np.asarray(slots[name].cpu().numpy()) for name in loras}
    own = []
    for name, lora in loras.items():
        copies = 1 if lora.spread is None else lora.spread.copies
        own.append(sums.get(name, np.zeros(lora.table.num_experts + 1)) / copies)
    sharded = any(parts.is_sharded(parameter) for parameter in lora_parameters(attached))
    if sharded:
        own += importance.values()
    own.append(agreement.probe(attached, slots))
    device = next(iter(loras.values())).compute_device
    summed = sum_over_processes(np.concatenate(own), device, attached.process_group)
    *found, probe = np.split(summed, np.cumsum([part.size for part in own])[:-1])
    agreement.check(probe)
    if sharded:
        importance = dict(zip(loras, found[len(loras) :], strict=True))
    return dict(zip(loras, found, strict=False)), importance
