"""Initial rows of A: Kaiming uniform, each drawn from a generator of its own.

A row depends on (seed, layer, projection, expert, rank dimension) and on nothing else, so both
layouts, resumed and distributed runs agree, and the user's random streams are never touched. Rank
dimensions are numbered in the order in which an expert got them, those that were cut included.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drlora_torch.lora.triton_use import runs_triton


class RowGenerator:
    """Draws the rows of A of one projection of one layer.

    Example:
        >>> rows = RowGenerator(seed=0, layer="experts", projection="down_proj", width=4)
        >>> bool((rows.draw(expert=3, dimension=0) == rows.draw(expert=3, dimension=0)).all())
        True
    """

    def __init__(self, seed: int, layer: str, projection: str, width: int) -> None:
        identity = f"{seed}\0{layer}\0{projection}".encode()
        digest = hashlib.blake2b(identity, digest_size=16).digest()
        self._key = np.frombuffer(digest, dtype=np.uint64)
        self._width = width
        self._bound = 1.0 / math.sqrt(width)

    def draw(self, expert: int, dimension: int) -> NDArray[np.float32]:
        """One row, float32 [width], uniform in +-1/sqrt(width) (Kaiming with a = sqrt(5))."""
        counter = np.array([0, 0, dimension, expert], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        unit = generator.random(self._width, dtype=np.float32)
        return (2.0 * self._bound) * unit - np.float32(self._bound)

    def draw_all(self, experts: Tensor, dimensions: Tensor) -> Tensor:
        """Many rows on the device of ``experts`` and ``dimensions``, both int64 [rows].

        Returns:
            float32 [rows, width]. On a GPU with Triton they are drawn there, the same bit for bit.
        """
        if runs_triton(experts):
            from drlora_torch.lora.rows_on_gpu import draw_unit

            unit = draw_unit(self._key.tolist(), experts, dimensions, self._width)
            return unit.mul_(2.0 * self._bound).sub_(self._bound)
        owners = zip(experts.tolist(), dimensions.tolist(), strict=True)
        drawn = torch.from_numpy(np.stack([self.draw(*each) for each in owners]))
        return drawn.to(experts.device)
