"""Experts in 4 bits, over the table.

The first test runs for the rows that always run; of the others, all but two rows are slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from drlora_torch.lora.kernels import grouped
from tests.torch.conformance.table import FAMILIES
from tests.torch.conformance.test_table import over_table, thinned
from tests.torch.quantized import checks, merging
from tests.torch.quantized.cases import in_table

FEW = ("olmoe", "gpt_oss")
few = over_table(FEW.__contains__, every=3)
some = over_table(FEW.__contains__, among=lambda name: bool(FAMILIES[name].fast))
"""Rows that add something."""


@thinned
def test_quantized_experts_are_their_dequantized_weights(name: str) -> None:
    checks.check_against_dequantized(in_table(name))


@pytest.mark.exhaustive
@few
def test_micro_batches_of_quantized_models(name: str) -> None:
    checks.check_micro_batches(in_table(name))


@some
def test_groups_of_quantized_experts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "GROUP_BYTES", 3 * checks.LARGEST)
    checks.check_grouped(in_table(name))


@few
def test_adapters_live_on_quantized_models(name: str, tmp_path: Path) -> None:
    checks.check_life(in_table(name), tmp_path)


@few
def test_files_of_quantized_models(name: str, tmp_path: Path) -> None:
    checks.check_files(in_table(name), tmp_path)


@some
def test_copies_of_quantized_models(name: str) -> None:
    checks.check_copies(in_table(name))


@some
def test_merging_quantized_models(name: str, tmp_path: Path) -> None:
    merging.check_merging(in_table(name), tmp_path)
