"""MoE models in plain PyTorch, written the ways that people write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import drlora_torch
from tests.torch.models import EXPERTS, HIDDEN, INNER, redraw


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INNER)
        self.w2 = nn.Linear(INNER, HIDDEN)
        self.w3 = nn.Linear(HIDDEN, INNER, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rows in, rows out."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """As Transformers 4 wrote them: experts on the tokens that chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = self.contain([Expert() for _ in range(EXPERTS)])

    def contain(self, experts: list[Expert]) -> Any:
        """Choose a container."""
        return nn.ModuleList(experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, L, H] in and out."""
        tokens = hidden.reshape(-1, HIDDEN)
        weights, index = top_2(self.gate(tokens))
        return self.mix(tokens, index, weights).view(hidden.shape)

    def mix(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Loop over the experts."""
        output = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, choice = torch.where(index == i)
            rows = expert(tokens[token]) * weights[token, choice, None]
            output = output.index_add(0, token, rows)
        return output


class DictBlock(Block):
    """Experts in a ModuleDict."""

    def contain(self, experts: list[Expert]) -> Any:
        """Name the experts."""
        return nn.ModuleDict({f"expert_{i}": expert for i, expert in enumerate(experts)})

    def mix(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Loop over the names."""
        output = torch.zeros_like(tokens)
        for i in range(EXPERTS):
            token, choice = torch.where(index == i)
            rows = self.experts[f"expert_{i}"](tokens[token]) * weights[token, choice, None]
            output = output.index_add(0, token, rows)
        return output


class DenseBlock(Block):
    """Every expert on every token, weighted by zero where it was not chosen."""

    def mix(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Stack all outputs."""
        dense = torch.zeros(tokens.shape[0], EXPERTS, dtype=weights.dtype)
        dense = dense.scatter(1, index, weights)
        outputs = torch.stack([expert(tokens) for expert in self.experts], dim=1)
        return (outputs * dense.unsqueeze(-1)).sum(dim=1)


class ToldBlock(Block):
    """Its caller routes."""

    def forward(self, hidden: Tensor, *, index: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """[B, L, H] in and out."""
        return self.mix(hidden.reshape(-1, HIDDEN), index, weights).view(hidden.shape)


class BypassingBlock(Block):
    """Reads the weights of a Linear instead of calling it."""

    def mix(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Call no Linear of the first projection."""
        output = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            token, choice = torch.where(index == i)
            gate = F.silu(F.linear(tokens[token], expert.w1.weight, expert.w1.bias))
            rows = expert.w2(gate * expert.w3(tokens[token]))
            output = output.index_add(0, token, rows * weights[token, choice, None])
        return output


class Model(nn.Module):
    """Two MoE blocks between an embedding and a head."""

    def __init__(self, block: type[Block] = Block, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, HIDDEN)
        self.blocks = nn.ModuleList([block(), block()])
        self.head = nn.Linear(HIDDEN, 64)
        redraw(self)
        self.to(dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits."""
        hidden = self.embed(input_ids)
        for block in self.blocks:
            options = {}
            if isinstance(block, ToldBlock):
                weights, index = top_2(block.gate(hidden.reshape(-1, HIDDEN)))
                options = {"index": index, "weights": weights}
            hidden = hidden + block(hidden, **options)
        logits: Tensor = self.head(hidden)
        return logits


def top_2(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and indices of the largest two, renormalised."""
    weights, index = logits.softmax(dim=-1).topk(2, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), index


def by_gate(block: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """As ``register_moe`` wants it."""
    weights, index = top_2(logits)
    return index, weights


def by_caller(
    block: Any, hidden: Tensor, *, index: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Routing that the block is handed."""
    return index, weights


PROJECTIONS = ("w1", "w3", "w2")


def register() -> None:
    """Declare every class above but ``ToldBlock`` by one call, and that by another."""
    drlora_torch.register_moe(
        Block, experts="experts", projections=PROJECTIONS, router="gate", routing=by_gate
    )
    drlora_torch.register_moe(
        ToldBlock, experts="experts", projections=PROJECTIONS, router=None, routing=by_caller
    )
