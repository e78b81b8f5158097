"""Agreement between processes: one fused all-reduce of the routing counts per optimizer step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def several_processes() -> bool:
    """True if this process trains together with others."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return bool(distributed.get_world_size() > 1)


def is_first_process() -> bool:
    """True in the process that writes for all."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0


def sum_over_processes(values: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
    """Sum an array over all processes; the array itself where there is only one.

    Importance needs no exchange: it is read from gradients that data parallelism has averaged
    already, so every process reads the same numbers.
    """
    if not several_processes():
        return values
    summed = torch.from_numpy(values.copy()).to(device)
    torch.distributed.all_reduce(summed)
    total: NDArray[np.float64] = summed.cpu().numpy()
    return total
