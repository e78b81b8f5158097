"""A slow, obvious decoder of 4-bit experts, written without bitsandbytes.

NF4 is the list of QLoRA (arXiv 2305.14314, appendix E). FP4 is a sign, two bits of exponent and one
of mantissa, in the order of bits of bitsandbytes and divided by its largest value. The 8-bit codes
of scales are the dynamic tree of 8-bit optimizers (arXiv 2110.02861, section 2.2), as bitsandbytes
spreads it: in every decade the middles of equal parts.

Everything is computed in float32 and rounded to the dtype of the weight last, as QLoRA does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
MAGNITUDES = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
FP4 = [sign * value / 12.0 for sign in (1.0, -1.0) for value in MAGNITUDES]
CODES = {"nf4": NF4, "fp4": FP4}
LARGEST_GAP = {
    kind: max(high - low for low, high in zip(sorted(codes), sorted(codes)[1:], strict=False))
    for kind, codes in CODES.items()
}
"""Between neighbors of a code, in units of a block's largest value."""
BLOCK, NESTED_BLOCK = 64, 256


def dynamic() -> list[float]:
    """The 256 values of a byte that is a scale, smallest first."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*middles.tolist(), *(-middles).tolist()]
    return sorted(values)


DYNAMIC = torch.tensor(dynamic())


def scales(tensors: Mapping[str, Tensor], expert: int) -> Tensor:
    """The scale of every block of an expert, float32."""
    if "_offset" not in tensors:
        return tensors["_absmax"][expert].view(torch.float32)
    codes = tensors["_absmax"][expert].tolist()
    nested = tensors["_nested_absmax"][expert].view(torch.float32)
    offset = tensors["_offset"][expert].view(torch.float32)
    return torch.stack(
        [DYNAMIC[code] * nested[block // NESTED_BLOCK] for block, code in enumerate(codes)]
    ).add(offset)


def values(tensors: Mapping[str, Tensor], expert: int, kind: str, size: int) -> Tensor:
    """The weights of an expert one after the other, float32."""
    halves = [half for byte in tensors[""][expert].tolist() for half in (byte >> 4, byte & 15)]
    codes = torch.tensor([CODES[kind][half] for half in halves[:size]])
    each = scales(tensors, expert)
    return torch.cat([codes[i : i + BLOCK] * each[i // BLOCK] for i in range(0, size, BLOCK)])


def decode(
    tensors: Mapping[str, Tensor], kind: str, shape: tuple[int, ...], count: int, dtype: torch.dtype
) -> Tensor:
    """All experts, in the shape that the model keeps them in."""
    size = math.prod(shape) // count
    experts = [values(tensors, expert, kind, size) for expert in range(count)]
    return torch.stack(experts).to(dtype).view(shape)
