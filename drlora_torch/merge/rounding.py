"""How much of an update rounding has taken away or added, summed over experts."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor


@dataclasses.dataclass(slots=True)
class Rounding:
    """Squared norms of what rounding has changed, and of the update."""

    changed: float = 0.0
    update: float = 0.0

    def add(self, wanted: Tensor, written: Tensor, update: Tensor) -> None:
        """Count one expert: W + s B A, what was written of it, and s B A."""
        self.changed += (written.float() - wanted.float()).square().sum().item()
        self.update += update.float().square().sum().item()

    @property
    def relative(self) -> float:
        """Norm of the change over that of the update; 0 where there is no update."""
        return math.sqrt(self.changed / self.update) if self.update else 0.0
