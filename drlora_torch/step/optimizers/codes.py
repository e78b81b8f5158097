"""Fresh rows of quantized optimizer state.

A value is ``qmap[code] * scale`` of its block. Blocks lie in the flattened parameter and may span
rows, so only codes are written: the scale of a block also belongs to its other rows.

Shape letters: P rows of a parameter, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

_zeros = WeakTensorKeyDictionary()
"""Code of zero by map: to search a map on a GPU would wait for it."""
Reset = Callable[[Tensor], None]
"""Makes the rows of an int64 index fresh."""


def reset_blockwise(state: Mapping[str, Any], key: str) -> Reset | None:
    """Reset of uint8 ``state1`` or ``state2`` of bitsandbytes, codes [P, F] or [2, P, F].

    None if the codes of this key come without a map, or with one that has no zero.
    """
    codes: Tensor = state[key]
    number = key.removeprefix("state")
    qmap = state.get(f"qmap{number}")
    if qmap is None or f"absmax{number}" not in state or (zero := _code_of_zero(qmap)) is None:
        return None
    return lambda index: _fill(codes, index.to(codes.device), zero)


def reset_subclass(value: Any, rows: int) -> Reset | None:
    """Reset of a state of torchao (``OptimState8bit``, ``OptimState4bit``, ``OptimStateFp8``).

    None if a row cannot be made zero without a change to another row.
    """
    codes: Tensor = value.codes
    if type(value).__name__ == "OptimStateFp8":
        return lambda index: _fill(codes.view(torch.uint8), index.to(codes.device), 0)
    zero = _code_of_zero(value.qmap)
    if type(value).__name__ == "OptimState8bit" and zero is not None:
        return lambda index: _fill(codes, index.to(codes.device), zero)
    if type(value).__name__ == "OptimState4bit":
        return _reset_packed(codes, value.scale, zero, rows)
    return None


def _reset_packed(codes: Tensor, scale: Tensor, zero: int | None, rows: int) -> Reset | None:
    """Reset of 4-bit codes, two a byte, [P * F / 2].

    The map of second moments has no zero, so there the scale of whole blocks has to be 0.
    """
    if codes.numel() % rows or (zero is None and scale.numel() % rows):
        return None

    def reset(index: Tensor) -> None:
        index = index.to(codes.device)
        _fill(codes.view(rows, -1), index, 0 if zero is None else zero * 16 + zero)
        if zero is None:
            _fill(scale.view(rows, -1), index, 0)

    return reset


def is_quantized(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """True if the state of a parameter is stored as codes of bitsandbytes or torchao."""
    values = optimizer.state.get(parameter, {}).values()
    return any(
        getattr(value, "dtype", None) == torch.uint8 or hasattr(value, "codes") for value in values
    )


def _code_of_zero(qmap: Tensor) -> int | None:
    if qmap not in _zeros:
        found = (qmap == 0).nonzero()
        _zeros[qmap] = int(found[0]) if found.numel() else None
    zero: int | None = _zeros[qmap]
    return zero


def _fill(values: Tensor, index: Tensor, value: int) -> None:
    """Fill rows of [P, F], or of each of several [P, F]."""
    values.index_fill_(values.dim() - 2, index, value)
