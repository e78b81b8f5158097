"""The rows of :mod:`drlora_torch.lora.rows`, bit for bit, drawn where the LoRA is.

A growth event draws thousands of rows; to draw them on the host and upload them would take longer
than all else that it does.

NumPy's Philox generator (Salmon et al., 2011) is a function of a key and a counter: every four
64-bit numbers come from one counter, of which each gives two uniform numbers, low half first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PER_COUNTER = 8  # numbers


@triton.jit
def _multiply(a, b):
    """High and low half of a product of 64-bit numbers."""
    return tl.umulhi(a, b), a * b


@triton.jit
def _draw(
    unit, experts, dimensions, first_key, second_key, width, counters: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1) * counters + tl.arange(0, counters)
    c0 = (counter + 1).to(tl.uint64)
    c1 = tl.zeros_like(c0)
    c2 = c1 + tl.load(dimensions + row).to(tl.uint64)
    c3 = c1 + tl.load(experts + row).to(tl.uint64)
    k0 = c1 + first_key
    k1 = c1 + second_key
    m0 = c1 + 0xD2E7470EE14C6C93
    m1 = c1 + 0xCA5A826395121157
    for _ in tl.static_range(10):
        high0, low0 = _multiply(m0, c0)
        high1, low1 = _multiply(m1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B97F4A7C15
        k1 += 0xBB67AE8584CAA73B
    place = counter * 8
    target = unit + row * width + place
    for index in tl.static_range(4):
        word = c0 if index == 0 else (c1 if index == 1 else (c2 if index == 2 else c3))
        low = (word & 0xFFFFFFFF) >> 8
        high = word >> 40
        tl.store(target + 2 * index, low.to(tl.float32) * (1.0 / 16777216.0),
                 mask=place + 2 * index < width)  # fmt: skip
        tl.store(target + 2 * index + 1, high.to(tl.float32) * (1.0 / 16777216.0),
                 mask=place + 2 * index + 1 < width)  # fmt: skip


def draw_unit(key: tuple[int, int], experts: Tensor, dimensions: Tensor, width: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [rows, width].

    Args:
        key: of the projection.
        experts: of each row, int64 on the device to draw on.
        dimensions: rank dimension of each row, likewise.
        width: numbers of a row.
    """
    unit = torch.empty(len(experts), width, dtype=torch.float32, device=experts.device)
    counters = min(128, triton.next_power_of_2(triton.cdiv(width, PER_COUNTER)))
    grid: Any = (len(experts), triton.cdiv(triton.cdiv(width, PER_COUNTER), counters))
    _draw[grid](unit, experts, dimensions, *key, width, counters=counters)
    return unit
