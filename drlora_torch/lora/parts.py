"""The part of a tensor that this process holds: some rows of a DTensor, or all of a plain tensor.

Every operation on a row happens where the row is. A plain tensor is its own only part, so code
that goes through here serves one process and many.

Shape letters: P rows of a tensor, p of them here.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drlora_torch.lora.slots import IntArray


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor: processes hold it together."""
    library = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return library is not None and isinstance(tensor, library.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds, [p, ...]; it shares its memory with the tensor."""
    found: Any = tensor.detach()
    held: Tensor = found.to_local() if is_sharded(found) else found
    return held


def has_whole_rows(tensor: Tensor) -> bool:
    """True if a tensor is not cut, or along its first dimension only."""
    placements = getattr(tensor, "placements", ())
    return all(each.is_replicate() or each.is_shard(0) for each in placements)


def held_rows(tensor: Tensor) -> IntArray:
    """Which rows this process holds, ascending, int64 [p]; see :func:`has_whole_rows`."""
    if not is_sharded(tensor):
        return np.arange(len(tensor))
    spread: Any = tensor
    return _held_rows(spread.device_mesh, tuple(spread.placements), len(tensor))


@functools.lru_cache(maxsize=64)
def _held_rows(mesh: Any, placements: tuple[Any, ...], count: int) -> IntArray:
    from torch.distributed.tensor import distribute_tensor

    numbers = torch.arange(count, device=mesh.device_type)
    held = distribute_tensor(numbers, mesh, placements, src_data_rank=None).to_local()
    return np.asarray(held.cpu().numpy())


def find_rows(tensor: Tensor, wanted: IntArray) -> tuple[IntArray, Tensor]:
    """Find rows among those held here.

    Returns:
        Which of ``wanted`` are here, as places in it, and where in :func:`local`, int64 on the
        device of the tensor.
    """
    if not is_sharded(tensor):
        return np.arange(wanted.size), torch.from_numpy(wanted).to(tensor.device)
    held = held_rows(tensor)
    places = np.flatnonzero(np.isin(wanted, held))
    return places, torch.from_numpy(np.searchsorted(held, wanted[places])).to(tensor.device)


def spread_out(tensor: Tensor, values: Tensor) -> Tensor:
    """Values of the rows that are here [p, ...] in the places of these rows, [P, ...], 0 elsewhere.

    Those of a plain tensor are all rows, and returned as they are.
    """
    if not is_sharded(tensor):
        return values
    spread: Any = tensor
    key = spread.device_mesh, tuple(spread.placements), len(tensor)
    places = _held_places(*key, values.device)
    return values.new_zeros(len(tensor), *values.shape[1:]).index_copy_(0, places, values)


@functools.lru_cache(maxsize=64)
def _held_places(
    mesh: Any, placements: tuple[Any, ...], count: int, device: torch.device
) -> Tensor:
    return torch.from_numpy(_held_rows(mesh, placements, count)).to(device)


class HeldRows:
    """Where the same rows of several tensors are, on their devices.

    Each place is found and uploaded once, so that a step that needs it does not wait.
    """

    def __init__(self, wanted: IntArray) -> None:
        self.wanted = wanted
        self._found: dict[tuple[Any, ...], tuple[Tensor | None, Tensor]] = {}

    def of(self, tensor: Tensor) -> tuple[Tensor | None, Tensor]:
        """As :func:`find_rows`, both int64 on the device of the tensor; None: all are here."""
        spread: Any = tensor
        sharded = is_sharded(tensor)
        cut = (spread.device_mesh, tuple(spread.placements), len(tensor)) if sharded else ()
        key = (tensor.device, *cut)
        if key not in self._found:
            here, rows = find_rows(tensor, self.wanted)
            own = torch.from_numpy(here).to(rows.device) if sharded else None
            self._found[key] = own, rows
        return self._found[key]


def num_parts(tensor: Tensor) -> int:
    """Into how many parts a tensor is cut; 1 for one that is not."""
    if not is_sharded(tensor):
        return 1
    spread: Any = tensor
    sizes = zip(spread.device_mesh.shape, spread.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor the values of a whole one, or of one that is cut in the same way; in place."""
    if not is_sharded(tensor):
        tensor.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    spread: Any = tensor
    mesh, placements = spread.device_mesh, spread.placements
    if not is_sharded(values):
        whole = values.to(device=mesh.device_type, dtype=tensor.dtype)
        values = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    assert values.placements == placements  # type: ignore[attr-defined]
    local(tensor).copy_(local(values))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; of a DTensor a gathered copy, for which all holders must call."""
    found: Any = tensor.detach()
    gathered: Tensor = found.full_tensor() if is_sharded(tensor) else found
    return gathered
