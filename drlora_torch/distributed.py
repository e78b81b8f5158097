"""Agreement between processes: one fused all-reduce of the routing counts per optimizer step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def sum_over_processes(values: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
    """Sum an array over all processes; the array itself where there is only one.

    Importance needs no exchange: it is read from gradients that data parallelism has averaged
    already, so every process reads the same numbers.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    if distributed.get_world_size() == 1:
        return values
    summed = torch.from_numpy(values.copy()).to(device)
    distributed.all_reduce(summed)
    total: NDArray[np.float64] = summed.cpu().numpy()
    return total
