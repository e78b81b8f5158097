"""Peak performance of this machine: matrix products of given shapes, and memory copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.counts import Gemm

REPEATS = 5
LEAST = 0.05  # seconds of a repeat
PEAK_SIZE = 2048
COPIED = 2**28  # bytes
COLD = 2**28  # bytes of distinct operands, well above the last cache


def best_seconds(run: Callable[[], object]) -> float:
    """Seconds of a call, minimum over repeats."""
    run()
    started = time.perf_counter()
    run()
    count = max(1, int(LEAST / (time.perf_counter() - started)))
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(count):
            run()
        found.append((time.perf_counter() - started) / count)
    return min(found)


def gemm_seconds(gemm: Gemm, dtype: torch.dtype, cold: bool) -> float:
    """Seconds of all ``gemm.count`` products.

    Args:
        gemm: the shape.
        dtype: of operands and result.
        cold: True if the right operands come from memory, like the weights of experts; False if
            all operands are in cache, like the rows of an expert after its base product.
    """
    size = gemm.k * gemm.n * dtype.itemsize
    distinct = max(1, min(gemm.count, COLD // size)) if cold else 1
    left = _operand(1, gemm.m, gemm.k, gemm.left_transposed, dtype)[0]
    right = _operand(distinct, gemm.k, gemm.n, gemm.right_transposed, dtype)
    out = torch.empty(gemm.m, gemm.n, dtype=dtype)

    def run() -> None:
        for matrix in right:
            torch.mm(left, matrix, out=out)

    return best_seconds(run) / distinct * gemm.count


def _operand(
    count: int, rows: int, columns: int, transposed: bool, dtype: torch.dtype
) -> list[Tensor]:
    shape = (count, columns, rows) if transposed else (count, rows, columns)
    drawn = torch.ones(shape, dtype=dtype)
    return list(drawn.transpose(1, 2) if transposed else drawn)


def peak(dtype: torch.dtype) -> float:
    """Operations per second of a large square product."""
    gemm = Gemm("square", 1, PEAK_SIZE, PEAK_SIZE, PEAK_SIZE)
    return gemm.operations / gemm_seconds(gemm, dtype, cold=False)


def bandwidth() -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    return 2 * COPIED / best_seconds(lambda: target.copy_(source))
