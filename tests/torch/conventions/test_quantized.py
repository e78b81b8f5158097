"""Experts in 4 bits, in every convention that keeps them in one tensor per projection."""

from __future__ import annotations

from pathlib import Path

import pytest

from drlora_torch.lora.kernels import grouped
from tests.torch.quantized import checks
from tests.torch.quantized.cases import STACKED, of_convention

stacked = pytest.mark.parametrize("family", STACKED)
few = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("dbrx", "llama4") else [pytest.mark.slow])
        for name in STACKED
    ],
)


@stacked
def test_quantized_experts_are_their_dequantized_weights(family: str) -> None:
    checks.check_against_dequantized(of_convention(family))


@pytest.mark.slow
@few
def test_micro_batches_of_quantized_models(family: str) -> None:
    checks.check_micro_batches(of_convention(family))


@pytest.mark.slow
@few
def test_groups_of_quantized_experts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "GROUP_BYTES", 3 * checks.LARGEST)
    checks.check_grouped(of_convention(family))


@pytest.mark.slow
@few
def test_adapters_live_on_quantized_models(family: str, tmp_path: Path) -> None:
    checks.check_life(of_convention(family), tmp_path)


@pytest.mark.slow
@few
def test_files_of_quantized_models(family: str, tmp_path: Path) -> None:
    checks.check_files(of_convention(family), tmp_path)


@pytest.mark.slow
@few
def test_copies_of_quantized_models(family: str) -> None:
    checks.check_copies(of_convention(family))
