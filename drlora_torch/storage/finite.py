"""The refusal of weights that have diverged: before a save, a merge or an export, and in files."""

from __future__ import annotations

import torch
from torch import Tensor

from drlora_torch.errors import NotFiniteError
from drlora_torch.lora import parts

LARGEST = 1e18
"""About the root of float32's largest number: products of two values, such as B A and the squares
in optimizers, are finite."""
DIVERGED = f"values above {LARGEST:g} or not finite"


def is_finite(values: Tensor, dtype: torch.dtype | None = None) -> bool:
    """True if values, as another dtype would hold them, are finite and at most ``LARGEST``."""
    held = parts.local(values.detach())
    if not held.numel():
        return True
    ends = torch.stack(torch.aminmax(held if dtype is None else held.to(dtype))).float()
    return bool((ends.abs() <= LARGEST).all())  # NaN makes both ends NaN: False


def check_weights(where: str, values: Tensor) -> None:
    """Refuse to write weights that would take the place of good ones.

    Raises:
        NotFiniteError: they have diverged.
    """
    if not is_finite(values):
        raise NotFiniteError(
            f"{where} holds {DIVERGED}: the training has diverged; nothing was written, and what "
            "was there before is untouched; go on from an earlier checkpoint"
        )
