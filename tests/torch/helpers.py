"""What many tests do: build an engine, attach, give experts unequal ranks, take a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import drlora_torch
from drlora_core import AllocatorConfig, AllocatorEngine
from drlora_torch.adapter import state_of
from drlora_torch.lifecycle.residents import active_tracker
from tests.torch import models

CONFIG: dict[str, Any] = {
    "r_init": 2,
    "r_target": 4,
    "r_max": 8,
    "warmup_steps": 2,
    "growth_interval": 2,
    "growth_end": 6,
}
"""Events after optimizer steps 4 and 6."""


def engine(**changes: Any) -> AllocatorEngine:
    return AllocatorEngine(AllocatorConfig(**{**CONFIG, **changes}))


def attach(
    model: nn.Module, *, config: dict[str, Any] | None = None, **options: Any
) -> drlora_torch.Adapter:
    return drlora_torch.attach(model, engine(**(config or {})), **options)


def projections(adapter: drlora_torch.Adapter) -> Iterator[tuple[str, str, Any, Any]]:
    """Iterate over (layer name, projection name, ExpertLoRA, SlotLoRA)."""
    for name, layer in adapter.layers.items():
        for projection, slots in layer.lora.items():
            yield name, projection, layer.lora, slots


def owned(lora: Any, expert: int) -> list[int]:
    """Slots of an expert in the order of its rank dimensions."""
    table = lora.table
    slots = [s for s in range(table.num_slots) if table.owner[s] == expert]
    return sorted(slots, key=lambda s: table.position[s])


def free(lora: Any) -> list[int]:
    """Slots that nobody owns."""
    return [s for s in range(lora.table.num_slots) if lora.table.owner[s] == -1]


def grow(lora: Any, growth: list[int]) -> None:
    """Give the experts of one layer more rank by hand."""
    born = lora.table.grow(np.array(growth))
    lora.birth(born)


def uneven(adapter: drlora_torch.Adapter, seed: int = 0, scale: float = 0.2) -> None:
    """Spend the whole budget unevenly, by hand, and fill B so that the LoRA matters."""
    config = adapter.engine.config
    rng = np.random.default_rng(seed)
    for layer in adapter.layers.values():
        ranks = layer.lora.table.ranks()
        room = ranks.size * config.r_target - int(ranks.sum())
        growth = np.zeros_like(ranks)
        while growth.sum() < room:
            expert = min(int(rng.exponential(2.0)), ranks.size - 1)
            growth[expert] += ranks[expert] + growth[expert] < config.r_max
        grow(layer.lora, growth.tolist())
    fill(adapter, seed, scale)


@torch.no_grad()
def fill(adapter: drlora_torch.Adapter, seed: int = 0, scale: float = 0.2) -> None:
    """Draw the columns of B that have an owner, the same in both layouts."""
    generator = torch.Generator().manual_seed(seed)
    for _, _, lora, slots in projections(adapter):
        for expert in range(lora.table.num_experts):
            for slot in owned(lora, expert):
                drawn = torch.randn(slots.lora_B.shape[1], generator=generator)
                slots.lora_B[slot] = (scale * drawn).to(slots.lora_B)


def batch(seed: int = 0, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = models.tokens(rows, length, seed)
    return {"input_ids": ids, "labels": ids}


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    """One training step; the loss before it."""
    loss = model(**batch(seed)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def adamw(adapter: drlora_torch.Adapter, lr: float = 1e-2, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(adapter.parameters(), lr=lr, **options)


def rank_history(adapter: drlora_torch.Adapter) -> dict[str, list[int]]:
    return {name: ranks.tolist() for name, ranks in adapter.ranks().items()}


def pending(adapter: drlora_torch.Adapter) -> dict[str, Tensor]:
    """What the running optimizer step has gathered so far."""
    return active_tracker(state_of(adapter)).state_dict()


def equal(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, dtype and shape included."""
    return left.dtype == right.dtype and torch.equal(left, right)


def checkpoint_activations(model: Any, *, reentrant: bool) -> None:
    """Switch gradient checkpointing on, by the name of today or the one before.

    Newer Transformers then let the embeddings require grad; taken back, so that tests see ours.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()


class Spy:
    """Keeps what the engine is given: ``samples`` has {layer name: (phi, s, tokens)} per step."""

    def __init__(self, adapter: drlora_torch.Adapter) -> None:
        self.adapter = adapter
        self.samples: list[dict[str, tuple[np.ndarray, np.ndarray, int]]] = []
        self._open: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
        self._observe, self._step = adapter.engine.observe_all, adapter.engine.step
        vars(adapter.engine).update(observe_all=self.observe_all, step=self.step)

    def observe_all(self, *, routing: Any, importance: Any, tokens: Any) -> None:
        self._open = {name: (routing[name], importance[name], tokens[name]) for name in routing}
        self._observe(routing=routing, importance=importance, tokens=tokens)

    def step(self) -> Any:
        self.samples.append(self._open)
        self._open = {}
        return self._step()


class RouterLog:
    """Routing decisions as the routers themselves gave them, by layer: [(index, weights)]."""

    def __init__(self, adapter: drlora_torch.Adapter) -> None:
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in adapter.layers}
        for name, layer in adapter.layers.items():
            assert layer.router is not None
            layer.router.register_forward_hook(
                lambda _module, _args, output, name=name: self.calls[name].append(
                    (output[2].detach().clone(), output[1].detach().clone())
                )
            )

    def phi(self, name: str, masks: list[Tensor | None]) -> np.ndarray:
        """Recompute phi by loops over the last ``len(masks)`` calls; masks are [batch, length]."""
        sums, counted = np.zeros(models.EXPERTS), 0
        for (index, weights), mask in zip(self.calls[name][-len(masks) :], masks, strict=True):
            keep = None if mask is None else mask.reshape(-1).tolist()
            for token in range(index.shape[0]):
                if keep is not None and not keep[token]:
                    continue
                counted += 1
                for expert, weight in zip(
                    index[token].tolist(), weights[token].tolist(), strict=True
                ):
                    sums[expert] += weight
        return sums / counted


@torch.no_grad()
def importance(adapter: drlora_torch.Adapter, scale: float = 1.0) -> dict[str, np.ndarray]:
    """s_j of every expert and rank dimension by loops over the gradients that are there now."""
    result = {}
    for name, layer in adapter.layers.items():
        table = layer.lora.table
        matrix = np.zeros((table.num_experts, table.r_max))
        for expert in range(table.num_experts):
            for dimension, slot in enumerate(owned(layer.lora, expert)):
                for _, slots in layer.lora.items():
                    for parameter in (slots.lora_A, slots.lora_B):
                        row, gradient = parameter[slot].double(), parameter.grad[slot].double()
                        matrix[expert, dimension] += float((row * gradient / scale).abs().mean())
        result[name] = matrix
    return result
