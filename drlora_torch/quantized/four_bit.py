"""NF4 and FP4: 4-bit codes with a scale for every 64 values, packed and unpacked by bitsandbytes.

Every expert is a tensor of its own to bitsandbytes: no block has values of two experts, so one
expert can be unpacked alone, at any size. With double quantization the scales are 8-bit codes
themselves, in blocks of 256, around a mean that is kept beside them (QLoRA, arXiv 2305.14314).

Shape letters: N experts, I input and O output features, n experts of a group, b blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import torch
from torch import Tensor

from drlora_torch.errors import ModelError
from drlora_torch.lora.stored import Stored

BLOCK = 64
NESTED_BLOCK = 256
TYPES = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = torch.int32
"""Scales are kept as the bits of float32: ``model.to(dtype)`` and mixed precision round floats."""
OLDEST = (0, 50)


@dataclasses.dataclass(frozen=True, slots=True)
class FourBit:
    """How the weights of all experts of one projection are packed."""

    quant_type: str
    """``nf4`` or ``fp4``."""
    double_quant: bool
    """Whether the scales are quantized too."""
    shape: tuple[int, ...]
    """Shape of the weight as the model had it, such as [N, O, I]."""
    num_experts: int
    dtype: torch.dtype
    """Data type of the weight as the model had it, and of an unpacked one."""

    @property
    def expert_shape(self) -> tuple[int, int]:
        """Rows and columns of one expert's weight, as the model stores them."""
        columns = self.shape[-1]
        return math.prod(self.shape) // (self.num_experts * columns), columns

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.expert_shape) // BLOCK)

    def empty(self, device: torch.device | str) -> dict[str, Tensor]:
        """Tensors of the right shapes and dtypes, by the suffix of their name."""
        count, blocks = self.num_experts, self.blocks
        code_bytes = -(-math.prod(self.expert_shape) // 2)
        new = functools.partial(torch.empty, device=device)
        tensors = {"": new(count, code_bytes, dtype=torch.uint8)}
        if not self.double_quant:
            return {**tensors, "_absmax": new(count, blocks, dtype=BITS)}
        nested = -(-blocks // NESTED_BLOCK)
        return {
            **tensors,
            "_absmax": new(count, blocks, dtype=torch.uint8),
            "_nested_absmax": new(count, nested, dtype=BITS),
            "_offset": new(count, dtype=BITS),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantize a weight of this shape, expert by expert."""
        packed = self.empty(weight.device)
        for expert, values in enumerate(weight.view(self.num_experts, *self.expert_shape)):
            self.pack_expert(packed, expert, values)
        return packed

    @torch.no_grad()
    def pack_expert(self, packed: dict[str, Tensor], expert: int, values: Tensor) -> None:
        """Quantize the weight of one expert into its place."""
        codes, state = load_bitsandbytes().quantize_4bit(
            values.contiguous(),
            blocksize=BLOCK,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )
        packed[""][expert] = codes.view(-1)
        if self.double_quant:
            packed["_absmax"][expert] = state.absmax
            packed["_nested_absmax"][expert] = state.state2.absmax.view(BITS)
            packed["_offset"][expert] = state.offset.view(BITS)
        else:
            packed["_absmax"][expert] = state.absmax.view(BITS)

    def is_sound(self, holder: Any, name: str) -> bool:
        """True if the scales of a weight are finite numbers."""
        floats = [getattr(holder, name + suffix) for suffix in self.empty("meta")]
        return all(
            bool(bits.view(torch.float32).isfinite().all()) for bits in floats if bits.dtype is BITS
        )

    def open(self, tensors: tuple[Tensor, ...], transposed: bool) -> FourBitWeight:
        """Take such tensors as a weight of the kernels."""
        return FourBitWeight(tensors, self, transposed)


@dataclasses.dataclass(frozen=True, eq=False)
class FourBitWeight(Stored):
    """Packed weights of the experts: codes, scales, and the scales' own scales and means."""

    format: FourBit
    transposed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, columns = self.format.expert_shape
        count = self.tensors[0].shape[0]
        return (count, rows, columns) if self.transposed else (count, columns, rows)

    @property
    def dtype(self) -> torch.dtype:
        return self.format.dtype

    @property
    def kind(self) -> str:
        return self.format.quant_type

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        return self.matrices(expert, expert + 1, dtype)[0]

    def matrices(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        weights = self.unpack(first, last).to(dtype)
        return weights if self.transposed else weights.transpose(1, 2)

    def unpack(self, first: int, last: int) -> Tensor:
        """Weights of some experts as the model stores them, [n, O, I] or [n, I, O]."""
        rows, columns = self.format.expert_shape
        codes, scales = self.tensors[0][first:last], self._scales(first, last)
        if last - first == 1 or rows * columns % BLOCK == 0:
            return _decode(codes, scales, (last - first, rows, columns), self.format)
        weights = torch.empty(last - first, rows, columns, dtype=self.dtype, device=codes.device)
        for weight, code, scale in zip(weights, codes, scales, strict=True):
            weight.copy_(_decode(code, scale, (rows, columns), self.format))
        return weights

    def _scales(self, first: int, last: int) -> Tensor:
        """Scales of the blocks of some experts, float32 [n, b]."""
        if not self.format.double_quant:
            return self.tensors[1][first:last].view(torch.float32)
        _, codes, *floats = (tensor[first:last] for tensor in self.tensors)
        nested, offset = (bits.view(torch.float32) for bits in floats)
        nested = nested.repeat_interleave(NESTED_BLOCK, dim=1)[:, : self.format.blocks]
        return _scale_codes(codes.device)[codes.int()] * nested + offset.unsqueeze(1)


def _decode(codes: Tensor, scales: Tensor, shape: tuple[int, ...], form: FourBit) -> Tensor:
    """Unpack experts, or one of any size.

    To bitsandbytes they are rows of one block, or one row of even length: where columns are a
    multiple of 16 and not of 64, its kernel for AVX-512 (seen in 0.50.2) takes the scales of other
    blocks, and for an odd number of columns it compiles a function, which takes seconds.
    """
    functional = load_bitsandbytes()
    room = 2 * codes.numel()
    state = functional.QuantState(
        absmax=scales.reshape(-1),
        shape=torch.Size((room // BLOCK, BLOCK) if room % BLOCK == 0 else (room,)),
        dtype=form.dtype,
        blocksize=BLOCK,
        quant_type=form.quant_type,
    )
    values: Tensor = functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return values.view(-1)[: math.prod(shape)].view(shape)


@functools.cache
def _scale_codes(device: torch.device) -> Tensor:
    """The 256 values of an 8-bit scale, as ``quantize_4bit`` uses them."""
    codes: Tensor = load_bitsandbytes().create_dynamic_map().to(device)
    return codes


def load_bitsandbytes() -> Any:
    """Return ``bitsandbytes.functional``; a ModelError says what to install."""
    try:
        import bitsandbytes
        import bitsandbytes.functional
    except ImportError as error:
        raise ModelError(
            "4-bit experts need bitsandbytes, which cannot be imported "
            f"({error}); pip install 'drlora[quantized]'"
        ) from error
    found = tuple(int(part) for part in re.findall(r"\d+", bitsandbytes.__version__)[:2])
    if found < OLDEST:
        raise ModelError(
            f"4-bit experts need bitsandbytes {'.'.join(map(str, OLDEST))} or newer, and "
            f"{bitsandbytes.__version__} is installed; pip install -U 'drlora[quantized]'"
        )
    return bitsandbytes.functional
