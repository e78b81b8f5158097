"""Stacked MoE blocks with random frozen weights, for the benchmarks of a step.

Shape letters: N experts, H model width, I expert width, K experts per token, T tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock


@dataclasses.dataclass(frozen=True)
class Shape:
    """Experts N, model width H, expert width I, experts per token K, tokens T, layers."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    layers: int = 1


SHAPES = {
    "olmoe": Shape(64, 2048, 1024, 8, 512),
    "qwen3": Shape(128, 2048, 768, 8, 512),
    "small": Shape(64, 512, 256, 8, 1024, layers=4),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Blocks(nn.Module):
    """A stack of MoE blocks with residual connections."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reentrant: bool | None = None
        """``use_reentrant`` of gradient checkpointing; None: no checkpointing."""

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                hidden = hidden + layer(hidden)
            else:
                hidden = hidden + checkpoint(layer, hidden, use_reentrant=self.reentrant)
        return hidden


class Case:
    """A shape and dtype, with one set of frozen weights that all methods share.

    A block of the shape of Qwen3 has 2.4 GB in float32, too much for a copy per method.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        generator = torch.Generator().manual_seed(0)
        self._weights: list[dict[str, Tensor]] = [
            {
                name: torch.empty(parameter.shape, dtype=dtype).normal_(
                    0.0, 0.02, generator=generator
                )
                for name, parameter in self._skeleton("eager").named_parameters()
            }
            for _ in range(shape.layers)
        ]

    def _skeleton(self, implementation: str) -> OlmoeSparseMoeBlock:
        """A block on the meta device."""
        config = OlmoeConfig(
            hidden_size=self.shape.hidden,
            intermediate_size=self.shape.intermediate,
            num_experts=self.shape.experts,
            num_experts_per_tok=self.shape.top_k,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            return OlmoeSparseMoeBlock(config)

    def blocks(self, implementation: str = "grouped_mm") -> Blocks:
        """A frozen model with the shared weights, in training mode."""
        layers: list[nn.Module] = []
        for weights in self._weights:
            block = self._skeleton(implementation)
            block.load_state_dict(weights, assign=True)
            layers.append(block)
        return Blocks(layers).requires_grad_(False).train()

    def hidden(self, tokens: int | None = None) -> Tensor:
        """An input [1, T, H] that requires a gradient."""
        generator = torch.Generator().manual_seed(1)
        shape = (1, tokens or self.shape.tokens, self.shape.hidden)
        hidden = torch.randn(shape, generator=generator).to(self.dtype)
        return hidden.requires_grad_(True)
