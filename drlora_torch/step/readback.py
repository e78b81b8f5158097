"""Copies of device values to the host that nobody waits for before the values are wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def is_on_host(tensor: Tensor) -> bool:
    """True if the host reads a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


class Readback:
    """Values on their way to the host.

    The copy is queued behind the work of the device, and goes into pinned memory: torch pins the
    destination of a copy to the CPU that does not block.
    """

    def __init__(self, values: Tensor) -> None:
        self._held = values.to("cpu", non_blocking=True)
        self._arrived: Any = None
        self.is_on_host = is_on_host(values)
        """True if the values were there from the start."""
        if not self.is_on_host:
            self._arrived = torch.accelerator.current_stream(values.device).record_event()

    def values(self) -> NDArray[np.float64]:
        """The values, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return np.asarray(self._held.numpy())
