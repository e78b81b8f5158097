"""Do all processes train the same adapter? Asked in the one all-reduce of each optimizer step.

Data parallelism averages gradients, so every process reads the same importance and takes the same
decisions. Where it does not know the LoRA, the copies would drift apart without a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drlora_torch.attached import Attached
from drlora_torch.errors import AttachError
from drlora_torch.lora import parts
from drlora_torch.step.parameters import lora_parameters
from drlora_torch.step.processes import several_processes

SIZE = 3  # numbers of a probe
TOLERANCE = 1e-4  # of the standard deviation over processes, relative to the mean
APART = (
    "the processes train apart: their gradients of the expert LoRA differ, and so would their "
    "weights and ranks. DistributedDataParallel synchronizes only parameters that exist when it is "
    "made; wrong:\n"
    "    parallel = DistributedDataParallel(model)\n"
    "    adapter = attach(model, engine)\n"
    "right:\n"
    "    adapter = attach(model, engine)\n"
    "    parallel = DistributedDataParallel(model)\n"
    "and train through `parallel`. If you do that already, it may wait in vain for the gradients "
    "of Linears that the loss does not depend on: name the others with attention_targets=, or pass "
    "find_unused_parameters=True to DistributedDataParallel"
)


def probe(attached: Attached, slots: Sequence[Tensor], device: torch.device) -> Tensor:
    """What a process adds to the sum over all: 1, its total importance, and that squared.

    float64 [SIZE] on ``device``, where the importance is too.

    At the first step all importance is 0, since B is; then the total size of the gradients. Rows
    that processes hold together have one gradient.
    """
    lora = lora_parameters(attached)
    if not several_processes(attached.process_group) or any(map(parts.is_sharded, lora)):
        return torch.zeros(SIZE, dtype=torch.float64, device=device)
    totals = [values.sum() for values in slots]
    if not attached.engine.step_count:
        gradients = [parameter.grad for parameter in lora if parameter.grad is not None]
        totals = [gradient.double().abs().sum().to(device) for gradient in gradients] or totals
    total = torch.stack(totals).sum()
    return torch.stack([torch.ones_like(total), total, total.square()])


def check(summed: NDArray[np.float64]) -> None:
    """Refuse processes that differ; all see the same sums, so all of them raise.

    Raises:
        AttachError: they train apart.

    Example:
        >>> check(np.array([2.0, 3.0, 4.5]))  # two processes with 1.5 each
    """
    count, total, squares = summed.tolist()
    if count and squares / count - (total / count) ** 2 > (TOLERANCE * total / count) ** 2:
        raise AttachError(APART)
