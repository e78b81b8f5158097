"""Peak memory of a training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TrainerState

from drlora_torch.finetune.meter import Meter

BLOCK = 2**25  # float64, so 256 MiB


def started() -> Meter:
    meter = Meter()
    meter.on_train_begin(None, TrainerState(), None)
    return meter


def sample(meter: Meter) -> float:
    meter.on_step_end(None, TrainerState(), None)
    assert meter.peak_memory_mb is not None
    return meter.peak_memory_mb


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures memory of the process")
def test_the_peak_is_the_largest_sample_and_starts_anew() -> None:
    first = started()
    assert first.peak_memory_mb is None
    assert first.memory_source == "process, sampled"
    before = sample(first)
    block = np.ones(BLOCK)
    peak = sample(first)
    del block
    assert peak > before + 200
    assert sample(first) == peak
    assert sample(started()) < peak - 200
