"""Importance of rank dimensions, read from the LoRA gradients (AdaLoRA, arXiv 2303.10512, eq. 8).

Shape letters: P rank slots, N experts, R = r_max rank dimensions, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from drlora_torch.lora.layers import ExpertLoRA
from drlora_torch.step.processes import several_processes


@torch.no_grad()
def mean_sensitivity(parameter: Tensor, gradient: Tensor) -> Tensor:
    """mean |w * dL/dw| of every row, [P, I] or [P, O] -> [P]."""
    # abs and mean use vector instructions, which linalg.vector_norm(ord=1) does not
    return (parameter * gradient).abs_().mean(dim=1)


@torch.no_grad()
def slot_importance(lora: ExpertLoRA) -> Tensor | None:
    """s_j of every slot: mean |A_j * dA_j| + mean |B_j * dB_j|, summed over the projections.

    Returns:
        float64 [P] on the device of the parameters; None if no parameter has a gradient. A
        parameter without one (nothing was routed there) adds 0.
    """
    total: Tensor | None = None
    for _, projection in lora.items():
        for parameter in (projection.lora_A, projection.lora_B):
            if parameter.grad is not None:
                part = mean_sensitivity(parameter, parameter.grad).double()
                total = part if total is None else total + part
    return total


def by_dimension(lora: ExpertLoRA, slots: Tensor | None) -> NDArray[np.float64]:
    """Arrange the importance of slots by expert and rank dimension, float64 [N, R]."""
    if slots is None:
        return np.zeros((lora.table.num_experts, lora.table.r_max))
    return lora.table.per_dimension(slots.cpu().numpy())


class ImportanceReader:
    """Reads importance as gradients arrive, where no torch optimizer steps (``auto_step=False``).

    Autograd's accumulation hooks see the gradient summed over the micro-batches so far, so the
    last value of a step is that of its whole gradient, and it survives ``zero_grad``. With several
    processes the gradients are read at the end of the backward pass, when they are averaged.
    """

    def __init__(self, loras: Iterable[ExpertLoRA]) -> None:
        self._parts: dict[str, Tensor] = {}  # importance of the slots [P] by parameter
        self._keys: dict[str, list[str]] = {}
        self._late: dict[str, Tensor] = {}  # parameters to read when the backward pass has ended
        self._handles: list[RemovableHandle] = []
        for lora in loras:
            self._keys[lora.name] = list(lora.tensors())
            for key, parameter in lora.tensors().items():
                handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._arrived, key)
                )
                self._handles.append(handle)

    def take(self, grad_scale: float) -> dict[str, Tensor | None]:
        """Importance of every layer's slots since the last call, for the unscaled gradients."""
        taken: dict[str, Tensor | None] = {}
        for name, keys in self._keys.items():
            parts = [self._parts[key] for key in keys if key in self._parts]
            taken[name] = torch.stack(parts).sum(0) / grad_scale if parts else None
        self._parts.clear()
        return taken

    def forget(self) -> None:
        """Drop what was read."""
        self._parts.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """What was read since the last :meth:`take`, float64 [P] by parameter."""
        return dict(self._parts)

    def load_state_dict(self, parts: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._parts = dict(parts)

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    def _arrived(self, key: str, parameter: Tensor) -> None:
        if not several_processes():
            self._read(key, parameter)
            return
        # Callbacks run in order at the end of the backward pass; one that is queued by a callback
        # comes after that of DistributedDataParallel, which averages. A backward pass that fails
        # drops its callbacks, so each arrival queues one; the first that runs reads everything.
        self._late[key] = parameter
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._read_late))

    def _read_late(self) -> None:
        late, self._late = self._late, {}
        for key, parameter in late.items():
            if parameter.grad is not None:
                self._read(key, parameter)

    def _read(self, key: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._parts[key] = mean_sensitivity(parameter, parameter.grad).double()
