"""FP8, FP4 and MXFP4: small floating-point codes, with a scale for every tile of a weight.

FP8 codes are ``float8_e4m3fn``, with tiles of usually 128 x 128 values (DeepSeek-V3, arXiv
2412.19437, section 3.3). FP4 codes are E2M1, two in a byte, the first in its lower half, and a tile
is 32 values of a row; MXFP4 stores their scale as a power of two (Open Compute Project,
Microscaling Formats v1.0).

Shape letters: N experts, I input and O output features, n experts of a group.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from drlora_torch.lora.stored import Stored

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8 = torch.float8_e4m3fn
BIAS = 127  # of the exponents of MXFP4


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledWeight(Stored):
    """Codes [N, O, I], or two in a byte [N, O, I / 2], and scales [N, rows of tiles, columns]."""

    code: str
    """``fp8``, ``fp4`` or ``mxfp4``."""
    tile: tuple[int, int]
    """Rows and columns of a weight that share a scale."""

    @property
    def shape(self) -> tuple[int, int, int]:
        count, rows, columns = self.tensors[0].shape
        return count, columns if self.code == "fp8" else 2 * columns, rows

    @property
    def kind(self) -> str:
        return self.code

    @property
    def dtype(self) -> None:
        return None

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        return self.matrices(expert, expert + 1, dtype)[0]

    @torch.no_grad()
    def matrices(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        codes, scales = (tensor[first:last] for tensor in self.tensors)
        if self.code == "fp8":
            values = codes.to(dtype)
        else:
            values = _pairs(codes.device, dtype)[codes.view(torch.uint8).int()].flatten(-2)
        _scale(values, _as_float(scales), self.tile)
        return values.transpose(1, 2)


def _scale(values: Tensor, scales: Tensor, tile: tuple[int, int]) -> None:
    """Multiply the tiles of [n, O, I] by their scales, in place and rounded once."""
    rows, columns = values.shape[1:]
    scales = scales.repeat_interleave(tile[0], dim=1)[:, :rows]
    whole = columns // tile[1]
    tiles: Tensor = values[..., : whole * tile[1]].unflatten(  # type: ignore[no-untyped-call]
        -1, (whole, tile[1])
    )
    tiles.mul_(scales[..., :whole, None])
    if whole * tile[1] < columns:  # the last tiles are narrower
        values[..., whole * tile[1] :].mul_(scales[..., whole:])


def _as_float(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents of 2."""
    if scales.dtype is torch.uint8:
        return torch.exp2(scales.float() - BIAS)
    return scales.float()


@functools.cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values of each byte, [256, 2]."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=dtype, device=device)
    codes = torch.arange(256, device=device)
    return torch.stack([values[codes & 15], values[codes >> 4]], dim=1)
