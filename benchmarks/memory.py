"""Peak memory of tensors, counted exactly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Ledger(TorchDispatchMode):
    """Tracks the storages that operators allocate, in backward too, and when they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = {_storage_id(leaf) for leaf in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor) or leaf.is_meta:  # which takes no memory
                continue
            if _storage_id(leaf) not in before | self._known:
                self._enter(leaf.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _storage_id(leaf: object) -> int | None:
    return leaf.untyped_storage()._cdata if isinstance(leaf, torch.Tensor) else None


def peak_bytes(step: Callable[[], None]) -> int:
    """Peak bytes of the tensors that ``step`` allocates.

    Example:
        >>> peak_bytes(lambda: torch.zeros(256, dtype=torch.float32) + 1)
        2048
        >>> peak_bytes(lambda: torch.zeros(256, device="meta"))
        0
    """
    with _Ledger() as ledger:
        step()
    return ledger.peak


def training_peaks(prepare: Callable[[], None], step: Callable[[], None]) -> tuple[int, int]:
    """Peak bytes of ``step`` above what was held before it, and peak bytes overall.

    Args:
        prepare: builds the model and takes a first step.
        step: takes another step.

    Example:
        >>> kept = []
        >>> prepare = lambda: kept.append(torch.zeros(256))
        >>> training_peaks(prepare, lambda: kept.append(kept[0] + 1))
        (1024, 2048)
    """
    with _Ledger() as ledger:
        prepare()
        before, first = ledger.held, ledger.peak
        ledger.peak = before
        step()
    return ledger.peak - before, max(first, ledger.peak)
