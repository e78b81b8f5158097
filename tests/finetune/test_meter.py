"""Peak memory of a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from drlora_torch.finetune import meter
from drlora_torch.finetune.meter import PeakMemory

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures memory of the process")
BLOCK = 2**25  # float64, so 256 MiB


@pytest.mark.skipif(not meter.CLEAR_REFS.exists(), reason="only Linux can reset the peak")
def test_the_peak_is_exact_and_starts_anew() -> None:
    first = PeakMemory()
    before = first.mebibytes()
    block = np.ones(BLOCK)
    del block
    assert first.source == "process"
    peak = first.mebibytes()
    assert peak > before + 200
    assert PeakMemory().mebibytes() < peak - 200


def test_the_peak_is_sampled_where_it_cannot_be_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "CLEAR_REFS", tmp_path / "no" / "such" / "file")
    memory = PeakMemory()
    before = memory.mebibytes()
    block = np.ones(BLOCK)
    memory.sample()
    del block
    assert memory.source == "process, sampled"
    assert memory.mebibytes() > before + 200
