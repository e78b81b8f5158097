"""Agreement between processes: one fused all-reduce of the routing counts per optimizer step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed


def several_processes() -> bool:
    """True if this process trains together with others."""
    return _initialized() and distributed.get_world_size() > 1


def is_first_process() -> bool:
    """True in the process that writes for all."""
    return not _initialized() or distributed.get_rank() == 0


def sum_over_processes(values: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
    """Sum an array over all processes; the array itself where there is only one.

    Importance needs no exchange: it is read from gradients that data parallelism has averaged
    already, so every process reads the same numbers.
    """
    if not several_processes():
        return values
    summed = torch.from_numpy(values.copy()).to(device)
    distributed.all_reduce(summed)
    return np.asarray(summed.cpu(), dtype=np.float64)


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
