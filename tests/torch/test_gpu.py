"""On a GPU: both kernels against float64, and the decisions of a training on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.on_device import parity
from tests.torch import helpers, models


@pytest.mark.gpu
def test_kernels_are_right_to_rounding() -> None:
    differences = list(parity.compare(torch.device("cuda"), tiny=True))
    assert [each for each in differences if not each.fine] == []


def test_kernels_are_right_to_rounding_on_the_cpu() -> None:
    """The comparison itself, which needs no GPU, and that it can fail."""
    differences = list(parity.compare(torch.device("cpu"), tiny=True))
    assert [each for each in differences if not each.fine] == []
    assert not parity.Difference("case", float("nan"), "output", 1.0).fine


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["ragged", "grouped"])
def test_decisions_are_those_of_the_cpu(kernel: str) -> None:
    ranks, losses = {}, {}
    for device in ("cpu", "cuda"):
        model = models.build("olmoe").to(device)
        adapter = helpers.attach(model, kernel=kernel)
        optimizer, losses[device] = helpers.adamw(adapter), []
        for seed in range(6):
            batch = {key: values.to(device) for key, values in helpers.batch(seed).items()}
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(loss.item())
        ranks[device] = helpers.rank_history(adapter)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
    assert ranks["cuda"] == ranks["cpu"]
