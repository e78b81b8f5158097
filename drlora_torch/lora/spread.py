"""LoRA of a model whose experts are spread over processes before ``attach``.

A and B are DTensors, cut by rows over all processes of the model. A forward gathers them and
computes with the part that its experts need: all of them, those of its experts (expert
parallelism), or some of their features (tensor parallelism). So the gradient of the whole A that a
process has is one part of a sum, and each row gets the sum of its parts where it is. Slots may
change owner freely, since no row belongs to the process of an expert.

Shape letters: P rank slots, N experts, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """How the experts of one layer, and the batches, are spread over processes."""

    mesh: Any
    """DeviceMesh of the processes that hold A and B."""
    placements: tuple[Any, ...]
    """``Shard(0)`` or ``Replicate()`` for each of its dimensions."""
    batches: int
    """How many different batches they train on."""
    divisor: Callable[[], float]
    """What a sum of gradients over these is divided by; asked for in each backward pass."""
    experts: slice = dataclasses.field(default_factory=lambda: slice(None))
    """Experts whose weights are here."""
    features: dict[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)
    """By projection and ``lora_A`` or ``lora_B``: features whose weights are here, int64; all
    features where there is no entry."""

    @property
    def copies(self) -> int:
        """How many processes train on the same batch."""
        return int(self.mesh.size()) // self.batches

    def shard(self, parameter: nn.Parameter) -> nn.Parameter:
        """Cut a parameter [P, F], the same on every process, by rows."""
        from torch.distributed.tensor import distribute_tensor

        held = distribute_tensor(parameter.detach(), self.mesh, self.placements, src_data_rank=None)
        return nn.Parameter(held, requires_grad=parameter.requires_grad)

    def gather(self, parameter: Tensor, projection: str, name: str) -> Tensor:
        """The whole parameter, or its features that are here: [P, F]."""
        from torch.distributed.tensor import Partial, Replicate

        spread: Any = parameter
        every = range(self.mesh.ndim)
        everywhere = spread.redistribute(placements=[Replicate() for _ in every])
        gathered: Tensor = everywhere.to_local(grad_placements=[Partial() for _ in every])
        if gathered.requires_grad:
            gathered.register_hook(partial(_share, self.divisor))  # type: ignore[no-untyped-call]
        chosen = self.features.get((projection, name))
        return gathered if chosen is None else gathered.index_select(1, chosen)


def _share(divisor: Callable[[], float], gradient: Tensor) -> Tensor:
    """The part of one batch in the gradient of all."""
    number = divisor()
    return gradient if number == 1.0 else gradient / number


def find_features(weight: Any, dimension: int) -> Tensor | None:
    """Which entries of a dimension of a DTensor are here, int64; None if all are."""
    from torch.distributed.tensor import distribute_tensor

    cut = [p if not p.is_replicate() and p.dim % weight.dim() == dimension else None
           for p in weight.placements]  # fmt: skip
    if not any(cut):
        return None
    from torch.distributed.tensor import Replicate

    shape = [1] * weight.dim()
    shape[dimension] = weight.shape[dimension]
    numbers = torch.arange(weight.shape[dimension], device=weight.device_mesh.device_type)
    placements = [placement or Replicate() for placement in cut]
    held = distribute_tensor(
        numbers.view(shape), weight.device_mesh, placements, src_data_rank=None
    )
    found: Tensor = held.to_local().reshape(-1)
    return found
