"""One call of a kernel: what is multiplied, what is differentiated, what is kept for backward.

Shape letters: T tokens, K experts per token, S = T * K (token, expert) pairs, N experts,
I input and O output features, P rank slots, R rank dimensions of an expert at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels.factors import Owned
from drlora_torch.lora.stored import Stored


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Product:
    """The frozen weights, the owners of the slots and the sorted rows of one product."""

    weight: Stored
    bias: Tensor | None  # [N, O]
    owned: Owned | None
    """None: the base product alone."""
    scaling: float
    dropout: float
    dispatch: Dispatch
    gather: bool
    """Each pair's row is that of its token."""

    @property
    def tokens(self) -> Tensor | None:
        """The token of each row [S], where the inputs are tokens [T, I]; else None: rows [S, I]."""
        return self.dispatch.tokens if self.gather else None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The data of the model, as a backward pass needs it."""
        return self.weight.tensors if self.bias is None else (*self.weight.tensors, self.bias)

    def given(self, tensors: Sequence[Tensor]) -> Product:
        """The same with other data; ``given(())`` has none."""
        count = len(tensors) - (self.bias is not None)
        weight = dataclasses.replace(self.weight, tensors=tuple(tensors[: max(count, 0)]))
        bias = tensors[-1] if self.bias is not None and tensors else self.bias
        return dataclasses.replace(self, weight=weight, bias=bias)


class Inputs(NamedTuple):
    """What a product is differentiated in."""

    inputs: Tensor  # [S, I], or [T, I]
    lora_A: Any  # [P, I]; None without LoRA
    lora_B: Any  # [P, O]; likewise
    routing_weights: Tensor | None  # [T, K]


class Kept(NamedTuple):
    """What a forward keeps for its backward, beside the inputs and the weights."""

    low: Tensor | None
    """s x A^T, [S, R]; what lies behind an expert's rank is not read."""
    keep: Tensor | None
    """Dropout's factors [S, I]: 0, or 1 / (1 - p) where an input is kept."""


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of the inputs, A, B and the routing weights; None where none is wanted."""


def draw_kept(rows: Tensor, dropout: float) -> Tensor | None:
    """Dropout's factors for some rows; None without dropout."""
    if dropout == 0.0:
        return None
    return torch.empty_like(rows).bernoulli_(1.0 - dropout).div_(1.0 - dropout)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside, products have the data types that they are given."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
