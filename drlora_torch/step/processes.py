"""The processes that train one adapter together: how many, which is first, and sums over them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed


def several_processes(group: Any = None) -> bool:
    """True if this process trains together with others, of a process group or of all."""
    return count_processes(group) > 1


def count_processes(group: Any = None) -> int:
    """How many processes train together."""
    return distributed.get_world_size(group) if _initialized() else 1


def is_first_process(group: Any = None) -> bool:
    """True in the process that writes for all."""
    return not _initialized() or distributed.get_rank(group) == 0


def sum_over_processes(values: Tensor, group: Any = None) -> Tensor:
    """Sum a tensor over the processes of a group, in place; return it."""
    if several_processes(group):
        distributed.all_reduce(values, group=group)
    return values


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
