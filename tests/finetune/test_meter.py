"""Peak memory of a training."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerState

from drlora_torch.finetune.watch.meter import Meter

BLOCK = 2**25  # float64, so 256 MiB
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures memory of the process")


def started() -> Meter:
    meter = Meter()
    meter.on_train_begin(None, TrainerState(), None)
    return meter


def peak(meter: Meter) -> float:
    meter.on_step_end(None, TrainerState(), None)
    assert meter.peak_memory_mb is not None
    return meter.peak_memory_mb


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_the_peak_within_a_step_counts_and_starts_anew() -> None:
    first = started()
    assert first.peak_memory_mb is None
    assert first.memory_source == "process"
    before = peak(first)
    block = np.ones(BLOCK)
    del block  # gone before the step ends
    highest = peak(first)
    assert highest > before + 200
    assert peak(first) == highest
    assert peak(started()) < highest - 200


def test_samples_where_the_peak_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "write_text", refuse)
    meter = started()
    assert meter.memory_source == "process, sampled"
    before = peak(meter)
    block = np.ones(BLOCK)
    highest = peak(meter)
    del block
    assert highest > before + 200
    assert peak(meter) == highest
