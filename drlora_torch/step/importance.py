"""Importance of rank dimensions, read from the LoRA gradients (AdaLoRA, arXiv 2303.10512, eq. 8).

Shape letters: P rank slots, I input and O output features.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from drlora_torch.lora import parts
from drlora_torch.lora.layers import ExpertLoRA


@torch.no_grad()
def mean_sensitivity(parameter: Tensor, gradient: Tensor) -> Tensor:
    """mean |w * dL/dw| of every row, [P, I] or [P, O] -> float64 [P].

    Computed in float32 at least: in float16 small products would underflow.
    """
    wide = torch.promote_types(parameter.dtype, torch.float32)
    # abs and mean use vector instructions, which linalg.vector_norm(ord=1) does not
    return (parameter.to(wide) * gradient.to(wide)).abs_().mean(dim=1).double()


def slot_importance(lora: ExpertLoRA) -> Tensor:
    """s_j of every slot: mean |A_j * dA_j| + mean |B_j * dB_j|, summed over the projections.

    Returns:
        float64 [P] on the device of the parameters. A parameter without a gradient (nothing was
        routed there) adds 0, and so do rows that other processes hold.
    """
    total = _zeros(lora)
    for parameter in lora.tensors().values():
        if parameter.grad is not None:
            total += _row_importance(parameter, parameter.grad)
    return total


def _row_importance(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The importance of the rows that are here, in their places, [P]."""
    here = mean_sensitivity(parts.local(parameter), parts.local(gradient))
    if not parts.is_sharded(parameter):
        return here
    places = torch.from_numpy(parts.held_rows(parameter)).to(here.device)
    everywhere = here.new_zeros(len(parameter))
    return everywhere.index_copy_(0, places, here)


class ImportanceReader:
    """Reads importance as gradients arrive, where no torch optimizer steps (``auto_step=False``).

    Autograd's accumulation hooks see the gradient summed over the micro-batches so far, so the
    last value of a step is that of its whole gradient, and it survives ``zero_grad``. With several
    processes :meth:`read` follows at the end of the backward pass, when gradients are averaged.
    """

    def __init__(self, loras: Iterable[ExpertLoRA]) -> None:
        self.parts: dict[str, Tensor] = {}
        """What was read since the last :meth:`take`, float64 [P] by parameter."""
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, key))  # type: ignore[no-untyped-call]
            for lora in loras
            for key, parameter in lora.tensors().items()
        ]

    def take(self, loras: Iterable[ExpertLoRA], grad_scale: float) -> dict[str, Tensor]:
        """Importance of the slots [P] of every layer, for the unscaled gradients; starts anew."""
        taken = {}
        for lora in loras:
            parts = [self.parts[key] for key in lora.tensors() if key in self.parts]
            taken[lora.name] = torch.stack(parts).sum(0) / grad_scale if parts else _zeros(lora)
        self.parts.clear()
        return taken

    def read(self, lora: ExpertLoRA) -> None:
        """Read the gradients of a layer as they are now."""
        for key, parameter in lora.tensors().items():
            self._arrived(key, parameter)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _arrived(self, key: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.parts[key] = _row_importance(parameter, parameter.grad)


def _zeros(lora: ExpertLoRA) -> Tensor:
    return torch.zeros(lora.table.num_slots, dtype=torch.float64, device=lora.device)
