"""NF4 and FP4 experts against bitsandbytes on each expert alone, and against a slow decoder."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from drlora_torch.quantized import four_bit, holders
from drlora_torch.quantized.four_bit import FourBit, FourBitWeight
from tests.torch.quantized import decoder

KINDS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
formats = pytest.mark.parametrize("double_quant", [False, True])
kinds = pytest.mark.parametrize("kind", KINDS)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Weights whose size differs from row to row, so that no two blocks have the same scale."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.empty(*shape[:-1], 1).uniform_(-3.0, 1.0, generator=generator)
    return (sizes * torch.randn(shape, generator=generator)).to(dtype)


def packed(weight: Tensor, kind: str, double_quant: bool, count: int = 0) -> tuple[FourBit, Any]:
    count = count or len(weight)
    form = FourBit(kind, double_quant, tuple(weight.shape), count, weight.dtype)
    return form, form.pack(weight)


def opened(form: FourBit, tensors: dict[str, Tensor], transposed: bool = False) -> FourBitWeight:
    return form.open(tuple(tensors.values()), transposed)


def alone(values: Tensor, kind: str, double_quant: bool) -> tuple[Tensor, Any]:
    """What bitsandbytes makes of one expert, a row of even length."""
    flat = torch.cat([values.reshape(-1), values.new_zeros(values.numel() % 2)])
    return bitsandbytes.functional.quantize_4bit(
        flat, blocksize=64, quant_type=kind, compress_statistics=double_quant
    )


SHAPES = [
    (3, 24, 32),
    (2, 16, 48),
    (4, 7, 9),
    (2, 1, 3),
    (3, 5, 1),
    (5, 8, 64),
    (2, 130, 128),
    (3, 128, 128),
]
"""With columns that are and are not multiples of 16, 64 and 2; two with 256 blocks or more."""


@kinds
@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_expert_is_what_bitsandbytes_makes_of_it_alone(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, double_quant: bool
) -> None:
    weight = drawn(shape, dtype)
    form, tensors = packed(weight, kind, double_quant)
    unpacked = opened(form, tensors).unpack(0, len(weight))
    assert unpacked.dtype is dtype
    for expert, values in enumerate(weight):
        codes, state = alone(values, kind, double_quant)
        assert torch.equal(tensors[""][expert], codes.view(-1))
        if double_quant:
            assert torch.equal(tensors["_absmax"][expert], state.absmax)
            nested = tensors["_nested_absmax"][expert].view(torch.float32)
            assert torch.equal(nested, state.state2.absmax)
            assert torch.equal(tensors["_offset"][expert].view(torch.float32), state.offset)
        else:
            assert torch.equal(tensors["_absmax"][expert].view(torch.float32), state.absmax)
        own = bitsandbytes.functional.dequantize_4bit(codes, state).view(-1)
        assert torch.equal(unpacked[expert].view(-1), own[: values.numel()])
        assert not torch.equal(unpacked[expert], values) or values.numel() < 4


@kinds
@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_is_what_the_published_codes_mean(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, double_quant: bool
) -> None:
    form, tensors = packed(drawn(shape, dtype), kind, double_quant)
    wanted = decoder.decode(tensors, kind, shape, shape[0], dtype)
    assert torch.equal(opened(form, tensors).unpack(0, shape[0]), wanted)


@kinds
def test_all_bytes(kind: str) -> None:
    """Every pair of codes, at scales of one block each."""
    form = FourBit(kind, False, (1, 8, 64), 1, torch.float32)
    tensors = form.empty("cpu")
    tensors[""].copy_(torch.arange(256, dtype=torch.uint8))
    factors = torch.tensor([1.0, 0.5, 3.0, 1e-20, 1e20, 0.0, 1.0, 7.0])
    tensors["_absmax"].copy_(factors.view(torch.int32))
    wanted = decoder.decode(tensors, kind, form.shape, 1, torch.float32)
    assert torch.equal(opened(form, tensors).unpack(0, 1), wanted)
    assert len(wanted[0, 0].unique()) == 16 if kind == "nf4" else 15  # 0 and -0


def test_scales_of_scales_are_the_dynamic_tree() -> None:
    assert torch.equal(four_bit._scale_codes(torch.device("cpu")), decoder.DYNAMIC)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Weights [N, O, I], or the same stacked [N O, I], and N."""
    count, rows, columns = (draw(st.integers(1, high)) for high in (4, 20, 70))
    weight = drawn((count, rows, columns), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    if draw(st.booleans()):  # a block, or an expert, of zeros
        weight[-1, : draw(st.integers(1, rows))] = 0.0
    if draw(st.booleans()):
        weight = weight.view(count * rows, columns)
    return weight, count


@given(weights(), st.sampled_from(KINDS), st.booleans(), st.booleans())
def test_what_is_packed_can_be_unpacked_anywhere(
    drawn: tuple[Tensor, int], kind: str, double_quant: bool, transposed: bool
) -> None:
    """Exactly, one expert or several at a time, in the dtype of the weight and in another."""
    weight, count = drawn
    form, tensors = packed(weight, kind, double_quant, count)
    empty = form.empty("meta")
    assert [(k, t.shape, t.dtype) for k, t in tensors.items()] == [
        (k, t.shape, t.dtype) for k, t in empty.items()
    ]
    stored = opened(form, tensors, transposed)
    wanted = decoder.decode(tensors, kind, (count, *form.expert_shape), count, weight.dtype)
    oriented = wanted if transposed else wanted.transpose(1, 2)
    assert stored.shape == oriented.shape
    assert stored.dtype is weight.dtype
    for dtype in (weight.dtype, torch.float32):
        each = [stored.matrix(expert, dtype) for expert in range(count)]
        assert torch.equal(torch.stack(each), oriented.to(dtype))
        for first in range(count):
            for last in range(first + 1, count + 1):
                group = stored.matrices(first, last, dtype)
                assert group.dtype is dtype
                assert torch.equal(group, oriented[first:last].to(dtype))


@given(weights(), st.sampled_from(KINDS), st.booleans())
def test_no_weight_is_farther_than_half_a_gap(
    drawn: tuple[Tensor, int], kind: str, double_quant: bool
) -> None:
    """|w - unpacked| <= absmax * largest gap / 2, where scales are kept as they are.

    With double quantization the scale itself is off by up to half a gap of the 8-bit code (at
    most 0.9 / 64 / 2) times the largest deviation of a scale from their mean.
    """
    weight, count = drawn
    form, tensors = packed(weight, kind, double_quant, count)
    found = opened(form, tensors).unpack(0, count).double().view(count, -1)
    rounding = torch.finfo(weight.dtype).eps
    for expert, values in enumerate(weight.double().view(count, -1)):
        blocks = values.split(64)
        largest = torch.stack([block.abs().max() for block in blocks])
        off = 0.0
        if double_quant:
            off = float((largest - largest.mean()).abs().max()) * (0.9 / 64 / 2 + 1e-6)
        for block, unpacked, most in zip(blocks, found[expert].split(64), largest, strict=True):
            bound = (most * decoder.LARGEST_GAP[kind] / 2 + off) * (1 + 1e-6)
            bound += rounding * (most + off)
            assert float((block - unpacked).abs().max()) <= float(bound)


@kinds
def test_the_nearest_code_is_taken(kind: str) -> None:
    """Scales as they are: no other of the 16 values of a block is nearer."""
    weight = drawn((2, 16, 48), torch.float32)
    form, tensors = packed(weight, kind, False)
    found = opened(form, tensors).unpack(0, 2).view(-1, 64)
    codes = torch.tensor(decoder.CODES[kind], dtype=torch.float64)
    for block, unpacked in zip(weight.view(-1, 64).double(), found.double(), strict=True):
        choices = codes * block.abs().max()
        nearest = (block.unsqueeze(1) - choices).abs().min(dim=1).values
        torch.testing.assert_close((block - unpacked).abs(), nearest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("double_quant", "size"), [(False, 4.5), (True, 4.127)])
def test_bits_of_a_weight(double_quant: bool, size: float) -> None:
    """4 bits, and 32 or 8 for every 64 weights, and 32 for every 64 * 256 of them (QLoRA)."""
    shape = (2, 128, 256)
    form, tensors = packed(drawn(shape, torch.bfloat16), "nf4", double_quant)
    nbytes = opened(form, tensors).nbytes
    assert nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    bits = 4 + (8 / 64 + 32 / (64 * 256) if double_quant else 32 / 64)
    offsets = 32 * shape[0] if double_quant else 0
    assert nbytes * 8 == bits * math.prod(shape) + offsets
    assert nbytes * 8 / math.prod(shape) == pytest.approx(size, abs=1e-3)


@formats
@pytest.mark.parametrize("convert", ["bfloat16", "half", "double", "float"])
def test_conversions_of_the_model_change_no_packed_bit(convert: str, double_quant: bool) -> None:
    """``model.to(dtype)`` rounds floats, so scales are no floats."""
    weight = drawn((3, 24, 40), torch.float32)
    form, tensors = packed(weight, "nf4", double_quant)
    holder = nn.Module()
    holder.weight, holder.other = nn.Parameter(weight), nn.Parameter(weight.clone())
    holders.declare(holder, "weight", form, {k: v.clone() for k, v in tensors.items()})
    getattr(nn.Sequential(holder), convert)()
    assert holder.other.dtype is getattr(torch, convert)
    for suffix, tensor in tensors.items():
        kept = getattr(holder, f"weight{suffix}")
        assert kept.dtype is tensor.dtype
        assert torch.equal(kept, tensor)
        assert not kept.requires_grad
    stored = holders.open_weight(holder, "weight", False)
    assert stored is not None
    assert torch.equal(stored.matrices(0, 3, torch.float32).transpose(1, 2), unpack(form, tensors))


def unpack(form: FourBit, tensors: dict[str, Tensor]) -> Tensor:
    return opened(form, tensors).unpack(0, form.num_experts)


@formats
def test_weights_that_do_not_lie_side_by_side(double_quant: bool) -> None:
    """A parameter may be a transposed view."""
    weight = drawn((3, 40, 24), torch.float32).transpose(1, 2)
    _, tensors = packed(weight, "nf4", double_quant)
    _, wanted = packed(weight.contiguous(), "nf4", double_quant)
    assert all(torch.equal(tensor, wanted[suffix]) for suffix, tensor in tensors.items())


def test_soundness_is_that_of_the_scales() -> None:
    form, tensors = packed(drawn((3, 24, 40), torch.float32), "nf4", True)
    for suffix, place in (("_nested_absmax", (2, 0)), ("_offset", (1,))):
        for bad in (math.inf, -math.inf, math.nan):
            holder = nn.Module()
            holder.weight = nn.Parameter(torch.empty(0))
            holders.declare(holder, "weight", form, {k: v.clone() for k, v in tensors.items()})
            assert form.is_sound(holder, "weight")
            getattr(holder, f"weight{suffix}").view(torch.float32)[place] = bad
            assert not form.is_sound(holder, "weight")


def test_holders_put_a_weight_back() -> None:
    weight = drawn((3, 24, 40), torch.float32)
    form, tensors = packed(weight, "fp4", True)
    holder = nn.Module()
    holder.first, holder.second = nn.Parameter(weight), nn.Parameter(weight.clone())
    attributes = sorted(vars(holder))
    for name in ("first", "second"):
        holders.declare(holder, name, form, tensors)
    assert list(holders.formats(holder)) == ["first", "second"]
    assert {name for name, _ in holder.named_parameters()} == {
        name + suffix for name in ("first", "second") for suffix in tensors
    }
    for name in ("first", "second"):
        holders.restore(holder, name, nn.Parameter(weight))
    assert dict(holder.named_parameters()).keys() == {"first", "second"}
    assert sorted(vars(holder)) == attributes
    assert holders.formats(holder) == {}
    assert holders.open_weight(holder, "first", False) is None
