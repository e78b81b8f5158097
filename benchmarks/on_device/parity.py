"""Both kernels on the device against float64 on the CPU, values and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import Kernel, expert_linear
from drlora_torch.lora.layers import ExpertLoRA, ProjectionShape
from drlora_torch.lora.slots import Layout, SlotTable
from drlora_torch.lora.stored import Dense

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""Largest relative error, by norm: a few roundings of the data type."""
NAMES = ("output", "inputs", "A", "B", "routing weights")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """N experts, I input and O output features, T tokens, K experts per token."""

    experts: int
    inputs: int
    outputs: int
    tokens: int
    top_k: int


SMALL = Sizes(7, 64, 48, 333, 3)
LARGE = Sizes(64, 2048, 1024, 2048, 8)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest relative error of a case, and of which of its values."""

    case: str
    error: float
    where: str
    bound: float

    @property
    def fine(self) -> bool:
        """Within the bound; NaN is not."""
        return self.error <= self.bound


def make_lora(sizes: Sizes, kernel: Kernel) -> ExpertLoRA:
    """Unequal ranks, none for one expert, slots that are not side by side."""
    ranks = np.random.default_rng(0).integers(0, 12, (2, sizes.experts))
    ranks[:, 1] = 0
    table = SlotTable(int(ranks.sum()) + 5, sizes.experts, 24, Layout.POOLED)
    for growth in ranks:
        table.grow(growth)
    shapes = {"up": ProjectionShape(sizes.inputs, sizes.outputs)}
    lora = ExpertLoRA("layer", shapes, table, 2.0, 0.0, 0, kernel)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters():
        parameter.data.normal_(0.0, 0.1, generator=generator)
    return lora


def run(
    sizes: Sizes, kernel: Kernel, device: torch.device, dtype: torch.dtype, exact: bool, token: bool
) -> list[Tensor]:
    """Values and gradients; the inputs are those of ``dtype``, computed with in float64 if exact.

    ``token``: inputs are tokens and outputs rows; else rows in, weighted sums out, with biases.
    """
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = (torch.randn(shape, generator=generator) * scale).to(dtype)
        return values.to(device, torch.float64 if exact else dtype)

    index = torch.rand(sizes.tokens, sizes.experts + 1, generator=generator)
    index = index.topk(sizes.top_k, dim=1).indices  # the last is a sentinel
    dispatch = Dispatch.sort(index.to(device), sizes.experts)
    rows = sizes.tokens if token else index.numel()
    inputs = draw(rows, sizes.inputs).requires_grad_()
    weight = draw(sizes.experts, sizes.outputs, sizes.inputs, scale=sizes.inputs**-0.5)
    bias, weights = draw(sizes.experts, sizes.outputs), draw(*index.shape).requires_grad_()
    lora = make_lora(sizes, kernel).to(device, torch.float64 if exact else torch.float32)
    output = expert_linear(
        inputs, Dense((weight,), False), None if token else bias, lora.factors("up"), dispatch,
        gather=token, routing_weights=None if token else weights,
    )  # fmt: skip
    seed = draw(*output.shape).to(output.dtype)
    if token:
        seed = seed * dispatch.live.unsqueeze(-1)
    wanted = [inputs, *lora.parameters(), *([] if token else [weights])]
    return [output.detach(), *torch.autograd.grad(output, wanted, seed)]


def compare(device: torch.device, *, tiny: bool) -> Iterator[Difference]:
    """Each kernel, data type and use of the kernels."""
    cpu = torch.device("cpu")
    for sizes in (SMALL,) if tiny else (SMALL, LARGE):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for token in (True, False):
                wanted = run(sizes, Kernel.RAGGED, cpu, dtype, True, token)
                for kernel in (Kernel.RAGGED, Kernel.GROUPED):
                    found = run(sizes, kernel, device, dtype, False, token)
                    yield _difference(sizes, kernel, dtype, token, found, wanted)


def _difference(
    sizes: Sizes, kernel: Any, dtype: torch.dtype, token: bool, found: Any, wanted: Any
) -> Difference:
    errors = [
        float((left.cpu().double() - right).norm() / right.norm())
        for left, right in zip(found, wanted, strict=True)
    ]
    worst = int(np.argmax(errors))
    where = f"{sizes.experts} x {sizes.inputs} x {sizes.outputs}, {sizes.tokens} tokens"
    name = str(dtype).removeprefix("torch.")
    case = f"{kernel.value}, {name}, {'first' if token else 'second'} projection, {where}"
    return Difference(case, errors[worst], NAMES[worst], BOUNDS[dtype])
