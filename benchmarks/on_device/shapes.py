"""MoE blocks of real models with random frozen weights, in the sizes of those models.

Shape letters: N experts, H model width, I expert width, K experts per token, T tokens.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class Shape:
    """A block of a model: where Transformers has it, and the values of its configuration."""

    family: str
    block: str
    config: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    values: dict[str, Any]

    def tiny(self) -> Shape:
        """The same block at a size for a test."""
        return dataclasses.replace(self, experts=8, hidden=64, intermediate=32, top_k=2)

    def settings(self) -> dict[str, Any]:
        """Arguments of the configuration."""
        sizes = {"N": self.experts, "I": self.intermediate, "K": self.top_k}
        named = {k: sizes.get(v, v) if isinstance(v, str) else v for k, v in self.values.items()}
        return {"hidden_size": self.hidden, **named}


SHAPES = {
    "OLMoE": Shape(
        "olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", 64, 2048, 1024, 8,
        {"num_experts": "N", "intermediate_size": "I", "num_experts_per_tok": "K"},
    ),
    "Qwen3-30B-A3B": Shape(
        "qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", 128, 2048, 768, 8,
        {"num_experts": "N", "moe_intermediate_size": "I", "num_experts_per_tok": "K",
         "norm_topk_prob": True},
    ),
    "gpt-oss-20b": Shape(
        "gpt_oss", "GptOssMLP", "GptOssConfig", 32, 2880, 2880, 4,
        {"num_local_experts": "N", "intermediate_size": "I", "num_experts_per_tok": "K"},
    ),
    "DeepSeek-V2-Lite": Shape(
        "deepseek_v2", "DeepseekV2Moe", "DeepseekV2Config", 64, 2048, 1408, 6,
        {"n_routed_experts": "N", "moe_intermediate_size": "I", "num_experts_per_tok": "K",
         "n_shared_experts": 2, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
}  # fmt: skip


class Blocks(nn.Module):
    """A stack of blocks with norms before them and residual connections."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.checkpointing = False

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            normed = nn.functional.rms_norm(hidden, hidden.shape[-1:])
            if self.checkpointing:
                output = checkpoint(layer, normed, use_reentrant=False)
            else:
                output = layer(normed)
            hidden = hidden + (output[0] if isinstance(output, tuple) else output)
        return hidden


class Case:
    """A shape, number of tokens and device, with one set of weights that all methods share."""

    def __init__(
        self, shape: Shape, tokens: int, layers: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape, self.tokens, self.device, self.dtype = shape, tokens, device, dtype
        generator = torch.Generator(device).manual_seed(0)
        self._weights = [
            {
                name: torch.empty(tensor.shape, dtype=dtype, device=device).normal_(
                    0.0, 0.02, generator=generator
                )
                for name, tensor in self._skeleton("eager").state_dict().items()
            }
            for _ in range(layers)
        ]

    def _skeleton(self, implementation: str) -> nn.Module:
        """A block on the meta device."""
        package = f"transformers.models.{self.shape.family}"
        configs = importlib.import_module(f"{package}.configuration_{self.shape.family}")
        blocks = importlib.import_module(f"{package}.modeling_{self.shape.family}")
        config = getattr(configs, self.shape.config)(**self.shape.settings())
        config._experts_implementation = implementation
        with torch.device("meta"):
            block: nn.Module = getattr(blocks, self.shape.block)(config)
        return block

    def blocks(self, implementation: str = "grouped_mm") -> Blocks:
        """A frozen model with the shared weights, in training mode."""
        layers = []
        for weights in self._weights:
            block = self._skeleton(implementation)
            block.load_state_dict(weights, assign=True)
            layers.append(block)
        return Blocks(layers).requires_grad_(False).train()

    def hidden(self, tokens: int | None = None) -> Tensor:
        """An input [1, T, H] that requires a gradient."""
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (1, tokens or self.tokens, self.shape.hidden)
        hidden = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        return hidden.requires_grad_(True)
