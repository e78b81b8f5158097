"""Build and run the models of the table: inputs, outputs, gradients, and the experts' inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import drlora_torch
from tests.torch.conformance.table import FAMILIES

ROWS, LENGTH = 3, 7
GRID = [[1, 4, 4], [1, 2, 4]]
"""Two images of 16 and 8 patches, for vision towers."""


def build(name: str, seed: int = 0, *, exact: bool = False, **changes: Any) -> Any:
    """Build a model of the table in training mode; the global RNG is left as it was.

    In float32; with ``exact`` in float64, for use inside :class:`Float64Throughout`.
    """
    family = FAMILIES[name]
    model_class, _ = family.classes(name)
    with torch.random.fork_rng(devices=[]):
        model = model_class(family.config(name, **changes))
    redraw(model, seed)
    if exact:
        model.set_experts_implementation("eager")  # torch's grouped product takes no float64
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():  # also those that ``model.to`` leaves in float32
                value.data = value.data.double()
    return model.train()


class Float64Throughout(TorchFunctionMode):
    """Within this mode, explicit float32 computations (routers, sums) use float64 too.

    Parity can then be checked to the last digits.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Draw weights with a spread at which experts and routers matter; fill lookup tables."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            routes = "gate.weight" in name or "router" in name
            spread = 0.3 if routes else 0.2 if "experts" in name else 0.1
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
        elif name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # all zeros until a checkpoint is loaded
            table.copy_(torch.randint(0, 8, table.shape, generator=generator))


def inputs(name: str, seed: int = 0, *, padded: bool = False) -> dict[str, Any]:
    """Draw the arguments of a forward; with ``padded`` the rows have 7, 5 and 2 tokens."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    if family.inputs == "patches":
        patches = sum(t * h * w for t, h, w in GRID)
        pixels = torch.randn(patches, 3 * 4 * 4, generator=generator)
        return {"pixel_values": pixels, "grid_thw": torch.tensor(GRID)}
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    if padded:
        mask[1, 5:] = 0
        mask[2, 2:] = 0
    arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if family.inputs == "embeds":
        drawn = torch.randn(ROWS, LENGTH, 32, generator=generator)
        # reentrant checkpointing gives no gradients where no input requires any
        return {**arguments, "inputs_embeds": drawn.requires_grad_(True)}
    ids = torch.randint(3, 64, (ROWS, LENGTH), generator=generator)
    if name == "ernie4_5_vl_moe":  # tokens 2 to 4 of each row are an image's
        kinds = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
        kinds[:, 2:4] = 1
        arguments["moe_mm_token_type_ids"] = kinds
    return {**arguments, "input_ids": ids}


def output(model: Any, arguments: dict[str, Any]) -> Tensor:
    """Logits, or the last hidden states of a model without a head.

    Random numbers are the same at every call: sparsemixer draws experts while training.
    """
    dtype = next(parameter.dtype for parameter in model.parameters())
    cast = {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in arguments.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = model(**cast)
    logits = getattr(result, "logits", None)
    chosen: Tensor = result.last_hidden_state if logits is None else logits
    mask = arguments.get("attention_mask")  # outputs at padding are undefined
    if mask is not None and chosen.dim() == 3:
        chosen = chosen * mask.unsqueeze(-1).to(chosen.dtype)
    return chosen


def loss(out: Tensor) -> Tensor:
    """Compute a scalar that depends on every output differently."""
    generator = torch.Generator().manual_seed(17)
    probe = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return (out * probe.to(out.dtype)).mean()


def step(model: Any, name: str, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    """Take one training step; return the loss before it."""
    value = loss(output(model, inputs(name, seed)))
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


class Received:
    """The routing that each adapted experts module received, call by call."""

    def __init__(self, adapter: drlora_torch.Adapter) -> None:
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in adapter.layers}
        for name, layer in adapter.layers.items():
            layer.experts.register_forward_pre_hook(
                lambda _module, args, name=name: self.calls[name].append(
                    (args[1].detach().clone(), args[2].detach().clone())
                )
            )

    def phi(self, name: str, keep: list[bool]) -> np.ndarray:
        """Recompute phi by loops over the last call; ``keep`` says which tokens count."""
        index, weights = self.calls[name][-1]
        sums = np.zeros(8)
        for token, counts in enumerate(keep):
            for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                sums[expert] += weight * counts
        return sums / sum(keep)


def kept_tokens(name: str, layer: str, arguments: dict[str, Any]) -> list[bool]:
    """Which of the tokens that a layer receives are no padding."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return [True] * sum(t * h * w for t, h, w in GRID)
    kinds = arguments.get("moe_mm_token_type_ids")
    if kinds is not None:
        mask = mask[kinds.bool() if "vision" in layer else ~kinds.bool()]
    return [bool(value) for value in mask.reshape(-1).tolist()]


@contextlib.contextmanager
def wherever_it_learns(model: nn.Module, adapter: drlora_torch.Adapter) -> Iterator[list[str]]:
    """Inside, every parameter outside the adapted experts requires grad; yields their names."""
    inside = tuple(f"{name}." for name in adapter.layers)
    names = [
        name
        for name, parameter in model.named_parameters()
        if not name.startswith(inside) and parameter.is_floating_point()
    ]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    try:
        yield names
    finally:
        for name in names:
            model.get_parameter(name).requires_grad_(False)
