"""Operations and bytes of a training step, by formula.

Shape letters: N experts, H model width, I expert width, K experts per token, T tokens,
S = T * K (token, expert) pairs, r mean rank, b bytes of a number.

An expert has two projections, H -> 2I (gate and up) and I -> H (down), and sees m = S / N rows on
average. A product of [m, k] and [k, n] is 2mkn operations and moves at least b(mk + kn + mn) bytes.

- Frozen: each projection forward and backward to its inputs, 2 * 2 * S * (2HI + IH) = 12 S H I
  operations; the router T * H * N, twice. Gradients of the weights are not needed.
- LoRA: per projection, in features i and out features o, low = x A^T and low B forward; g B^T,
  d_low A, d_low^T x and low^T g backward: 6 * S * r * (i + o), together 6 S r (2H + 3I). Over the
  frozen step this is r (2H + 3I) / (2HI): 2.7 % for OLMoE, 3.3 % for Qwen3, 11 % for ``small``.
- AdamW, over the N r (2H + 3I) trained numbers in float32: reads weight, gradient and two moments,
  writes weight and moments: 28 bytes each; its operations are negligible.
- Statistics: importance reads weight and gradient, 8 bytes each.
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.blocks import Shape

ADAMW_BYTES = 7 * 4  # a trained number: reads 4, writes 3 of them
STATISTICS_BYTES = 2 * 4


@dataclasses.dataclass(frozen=True)
class Gemm:
    """``count`` products of [m, k] and [k, n], and which operands are stored transposed."""

    what: str
    count: int
    m: int
    k: int
    n: int
    left_transposed: bool = False
    right_transposed: bool = False

    @property
    def operations(self) -> int:
        """Operations of all products, 2mkn each.

        Example:
            >>> Gemm("x W^T", count=3, m=4, k=5, n=6).operations
            720
        """
        return 2 * self.count * self.m * self.k * self.n

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of both operands and the result, once each."""
        numbers = self.m * self.k + self.k * self.n + self.m * self.n
        return self.count * numbers * dtype.itemsize


def projections(shape: Shape) -> dict[str, tuple[int, int]]:
    """In and out features by projection."""
    return {
        "gate_up": (shape.hidden, 2 * shape.intermediate),
        "down": (shape.intermediate, shape.hidden),
    }


def rows(shape: Shape) -> int:
    """m, the average number of rows per expert."""
    return shape.tokens * shape.top_k // shape.experts


def base_gemms(shape: Shape) -> list[Gemm]:
    """Products of the frozen experts, forward and backward to the inputs."""
    count, m = shape.layers * shape.experts, rows(shape)
    found = []
    for name, (i, o) in projections(shape).items():
        found.append(Gemm(f"{name}: x W^T", count, m, i, o, right_transposed=True))
        found.append(Gemm(f"{name}: g W", count, m, o, i))
    return found


def router_gemms(shape: Shape) -> list[Gemm]:
    """Products of the router, forward and backward."""
    t, h, n = shape.tokens, shape.hidden, shape.experts
    return [
        Gemm("router: x W^T", shape.layers, t, h, n, right_transposed=True),
        Gemm("router: g W", shape.layers, t, n, h),
    ]


def lora_gemms(shape: Shape, rank: int) -> list[Gemm]:
    """The low-rank products: two forward, four backward, per projection; A [r, i], B [r, o]."""
    count, m = shape.layers * shape.experts, rows(shape)
    found = []
    for name, (i, o) in projections(shape).items():
        found += [
            Gemm(f"{name}: x A^T", count, m, i, rank, right_transposed=True),
            Gemm(f"{name}: low B", count, m, rank, o),
            Gemm(f"{name}: g B^T", count, m, o, rank, right_transposed=True),
            Gemm(f"{name}: d_low A", count, m, rank, i),
            Gemm(f"{name}: d_low^T x", count, rank, m, i, left_transposed=True),
            Gemm(f"{name}: low^T g", count, rank, m, o, left_transposed=True),
        ]
    return found


def trained(shape: Shape, rank: int) -> int:
    """Number of parameters in A and B of all experts."""
    features = sum(i + o for i, o in projections(shape).values())
    return shape.layers * shape.experts * rank * features
