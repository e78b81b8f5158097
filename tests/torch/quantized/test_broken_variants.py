"""The tests of packed experts can fail: each of these changes breaks one, which must notice."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from drlora_torch.lora.dispatch import Dispatch
from drlora_torch.lora.kernels import Kernel, grouped
from drlora_torch.lora.kernels.product import Product
from drlora_torch.lora.stored import Stored
from drlora_torch.models.quantization import places, quantizer
from drlora_torch.quantized import four_bit
from drlora_torch.quantized.four_bit import FourBit, FourBitWeight
from tests.torch.quantized import checks, test_four_bit, test_packed_kernels, test_refusals
from tests.torch.quantized.cases import in_table
from tests.torch.test_broken_guards import replace

pytestmark = pytest.mark.slow
Break = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[pytest.MonkeyPatch, Path], None]
SHAPE = (2, 16, 48)


def scales_without_their_mean(self: FourBitWeight, first: int, last: int) -> Tensor:
    offset = self.tensors[3][first:last].view(torch.float32)
    return scales(self, first, last) - offset.unsqueeze(1)


def scales_of_the_next_block(self: FourBitWeight, first: int, last: int) -> Tensor:
    return scales(self, first, last).roll(-1, dims=1)


scales = FourBitWeight._scales


def pack_all_experts_as_one(self: FourBit, weight: Tensor) -> dict[str, Tensor]:
    """Blocks and the mean of the scales run over experts."""
    one = dataclasses.replace(self, num_experts=1)
    packed = pack(one, weight)
    count = self.num_experts
    nested = {key: value.expand(count, *value.shape[1:]) for key, value in packed.items()}
    return {
        **nested,
        "": packed[""].view(count, -1),
        "_absmax": packed["_absmax"].view(count, -1),
    }


def pack_low_halves_first(self: FourBit, weight: Tensor) -> dict[str, Tensor]:
    packed = pack(self, weight)
    return {**packed, "": packed[""] << 4 | packed[""] >> 4}


pack = FourBit.pack


def open_the_other_way(
    self: FourBit, tensors: tuple[Tensor, ...], transposed: bool
) -> FourBitWeight:
    return FourBitWeight(tensors, self, not transposed)


def unpack_all_for_one(self: FourBitWeight, expert: int, dtype: torch.dtype) -> Tensor:
    return self.matrices(0, self.shape[0], dtype)[expert]


def keep_the_unpacked(self: Product) -> tuple[Tensor, ...]:
    return (self.weight.matrices(0, self.weight.shape[0], torch.float32),)


def all_in_one_group(
    rows: Tensor, weight: Stored, dispatch: Dispatch, *, transposed: bool
) -> Tensor:
    matrices = grouped._chosen(weight, 0, weight.shape[0], rows, transposed)
    return grouped_mm(rows, matrices, offs=dispatch.offsets)


def groups_at_wrong_rows(shift: int, drop_last: bool = False) -> Callable[..., Tensor]:
    """Two experts a group; rows of each are ``shift`` too late, or the last group is left out."""

    def by_groups(rows: Tensor, weight: Stored, dispatch: Dispatch, *, transposed: bool) -> Tensor:
        count, inner, outer = weight.shape
        output = rows.new_zeros(len(rows), inner if transposed else outer)
        ends = [0, *itertools.accumulate(dispatch.counts[:-1])]
        for first in range(0, count - 2 * drop_last, 2):
            last = min(first + 2, count)
            start, stop = ends[first], ends[last]
            if start < stop:
                offsets = (dispatch.offsets[first:last] - start + shift).clamp(max=stop - start)
                group = grouped._chosen(weight, first, last, rows, transposed)
                output[start:stop] = grouped_mm(rows[start:stop], group, offs=offsets)
        return output

    return by_groups


def unpack_other_experts(place: Any, dtype: Any) -> Tensor:
    return unpack(place, dtype).flip(0)


unpack = places.unpack


def published(kind: str = "nf4", double_quant: bool = True) -> Check:
    return lambda *_: test_four_bit.test_unpacked_is_what_the_published_codes_mean(
        SHAPE, torch.float32, kind, double_quant
    )


def alone(*_: Any) -> None:
    test_four_bit.test_every_expert_is_what_bitsandbytes_makes_of_it_alone(
        SHAPE, torch.float32, "nf4", True
    )


def in_groups(patch: pytest.MonkeyPatch, _: Path) -> None:
    test_packed_kernels.test_groups_of_experts_multiply_as_all_at_once("some", 2, patch)


def damaged(_: pytest.MonkeyPatch, path: Path) -> None:
    test_refusals._quantized().save_pretrained(path / "whole")
    test_refusals.test_damaged_checkpoints("nan scale", path / "whole", path)


def dequantized(*_: Any) -> None:
    checks.check_against_dequantized(in_table("olmoe"))


BROKEN: dict[str, tuple[Break, Check]] = {
    "the mean of the scales is forgotten": (
        replace(FourBitWeight, "_scales", scales_without_their_mean),
        published(),
    ),
    "scales belong to other blocks": (
        replace(FourBitWeight, "_scales", scales_of_the_next_block),
        published("fp4", double_quant=False),
    ),
    "blocks run over experts": (replace(FourBit, "pack", pack_all_experts_as_one), alone),
    "the low half of a byte comes first": (replace(FourBit, "pack", pack_low_halves_first), alone),
    "scales are floats": (
        replace(four_bit, "BITS", torch.float32),
        lambda *_: test_four_bit.test_conversions_of_the_model_change_no_packed_bit(
            "bfloat16", False
        ),
    ),
    "weights are read the other way": (
        replace(FourBit, "open", open_the_other_way),
        dequantized,
    ),
    "groups begin at wrong rows": (
        replace(grouped, "_by_groups", groups_at_wrong_rows(1)),
        in_groups,
    ),
    "the last group is left out": (
        replace(grouped, "_by_groups", groups_at_wrong_rows(0, drop_last=True)),
        in_groups,
    ),
    "one expert is taken out of all": (
        replace(FourBitWeight, "matrix", unpack_all_for_one),
        lambda *_: test_packed_kernels.test_ragged_has_one_unpacked_expert_at_a_time(
            torch.float32, False
        ),
    ),
    "there is one group": (
        replace(grouped, "_by_groups", all_in_one_group),
        lambda patch, _: test_packed_kernels.test_grouped_has_one_unpacked_group_at_a_time(
            2, patch
        ),
    ),
    "autograd keeps unpacked weights": (
        replace(Product, "tensors", property(keep_the_unpacked)),
        lambda *_: test_packed_kernels.test_no_unpacked_weight_is_kept_for_backward(Kernel.GROUPED),
    ),
    "unpacking exchanges experts": (
        replace(places, "unpack", unpack_other_experts),
        dequantized,
    ),
    "checkpoints are taken as they come": (
        replace(quantizer, "check_loaded", lambda *_: None),
        damaged,
    ),
}


NOTICED = (AssertionError, RuntimeError, pytest.fail.Exception)
"""A RuntimeError comes from shapes that do not fit: no weight of the models is square."""


@pytest.mark.parametrize("variant", BROKEN)
def test_a_broken_variant_is_noticed(
    variant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change, check = BROKEN[variant]
    with monkeypatch.context() as patch:
        change(patch)
        with pytest.raises(NOTICED):
            check(patch, tmp_path / "broken")
    check(monkeypatch, tmp_path / "whole")
