"""The processes that train one adapter together: how many, which is first, and sums over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed


def several_processes(group: Any = None) -> bool:
    """True if this process trains together with others, of a process group or of all."""
    return _initialized() and distributed.get_world_size(group) > 1


def is_first_process(group: Any = None) -> bool:
    """True in the process that writes for all."""
    return not _initialized() or distributed.get_rank(group) == 0


def sum_over_processes(
    values: NDArray[np.float64], device: torch.device, group: Any = None
) -> NDArray[np.float64]:
    """Sum an array over the processes of a group; the array itself where there is only one."""
    if not several_processes(group):
        return values
    summed = torch.from_numpy(values.copy()).to(device)
    distributed.all_reduce(summed, group=group)
    return np.asarray(summed.cpu(), dtype=np.float64)


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
