"""The frozen weights of all experts of one projection, in whatever storage the model has them.

The kernels ask for one expert, or for a few, at a time; a packed weight is unpacked then, and never
as a whole.

Shape letters: N experts, I input and O output features, n experts of a group.
"""

from __future__ import annotations

import abc
import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Stored(abc.ABC):
    """Weights of all experts; ``dataclasses.replace(stored, tensors=...)`` exchanges the data."""

    tensors: tuple[Tensor, ...]
    """All of the data; what a product keeps for its backward."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(N, I, O)."""

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """Name of the storage, such as ``bfloat16`` or ``nf4``."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype | None:
        """Data type of an unpacked weight; None for that of what it is multiplied with."""

    @abc.abstractmethod
    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Weight of one expert [I, O]; a view where it is stored like that."""

    @abc.abstractmethod
    def matrices(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Weights of the experts ``first`` to ``last - 1``, [n, I, O]."""

    @property
    def packed(self) -> bool:
        """True if :meth:`matrix` makes a copy."""
        return True

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Stored):
    """One floating-point tensor, [N, O, I], or [N, I, O] if ``transposed``."""

    transposed: bool

    @functools.cached_property
    def _each(self) -> tuple[Tensor, ...]:
        return self._oriented(self.tensors[0]).unbind()

    def _oriented(self, weights: Tensor) -> Tensor:
        return weights if self.transposed else weights.transpose(1, 2)

    @property
    def shape(self) -> tuple[int, int, int]:
        count, rows, columns = self.tensors[0].shape
        return (count, rows, columns) if self.transposed else (count, columns, rows)

    @property
    def kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def packed(self) -> bool:
        return False

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        return self._each[expert].to(dtype)

    def matrices(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self._oriented(self.tensors[0])[first:last].to(dtype)

    def view(self, expert: int) -> Tensor:
        """Weight of one expert [O, I], as it lies in the model."""
        weight = self.tensors[0][expert]
        return weight.T if self.transposed else weight
