"""The LoRA of one Linear, of a fixed rank: attention, shared experts, dense layers.

Shape letters: R rank, I input and O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from drlora_torch.lora import parts
from drlora_torch.lora.rows import RowGenerator


class DenseLoRA(nn.Module):
    """A [R, I] and B [O, R] beside a Linear; both start at zero, and :meth:`draw` fills A.

    Args:
        name: of the Linear; seeds the rows of A.
        in_features: I.
        out_features: O.
        rank: R.
        scaling: s, the factor of B A.
        dropout: probability of dropping an input, in [0, 1).
        seed: seed of the rows of A.

    Example:
        >>> lora = DenseLoRA("q_proj", 6, 4, rank=2, scaling=2.0, dropout=0.0, seed=0)
        >>> lora.draw()
        >>> lora(torch.ones(3, 6)).shape, bool(lora(torch.ones(3, 6)).any())
        (torch.Size([3, 4]), False)
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scaling: float,
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.scaling = scaling
        self.dropout = dropout
        self.rows = RowGenerator(seed, name, "lora_A", in_features)
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """s B A x of inputs [..., I]: [..., O], in the dtype of A and B, or that of autocast."""
        given = inputs.to(self.lora_A.dtype)
        given = functional.dropout(given, self.dropout, self.training)
        return self.scaling * functional.linear(functional.linear(given, self.lora_A), self.lora_B)

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B, as files name them: ``dense/{name}/lora_A``."""
        return {f"dense/{self.name}/lora_{each}": getattr(self, f"lora_{each}") for each in "AB"}

    @torch.no_grad()
    def draw(self) -> None:
        """Draw A: Kaiming uniform, never from the global random stream."""
        dimensions = torch.arange(self.rank, device=self.lora_A.device)
        drawn = self.rows.draw_all(torch.zeros_like(dimensions), dimensions)
        parts.write(self.lora_A, drawn.to(self.lora_A))

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """s * (B A), [O, I], in the dtype of A and B."""
        return self.scaling * (self.lora_B @ self.lora_A)
