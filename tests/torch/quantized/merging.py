"""merge_and_save of quantized models: what a row of the tables is checked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import drlora_torch
from tests.torch import helpers
from tests.torch.quantized import checks
from tests.torch.quantized.cases import Case

ROUNDING = 2e-6
"""Relative error of outputs in float32, whose sums are taken in another order."""


def check_merging(case: Case, path: Path) -> None:
    """The written model computes what the adapted one does, under the names of the checkpoint."""
    base: Any = case.build()
    base.save_pretrained(path / "base")
    model = (
        type(base)
        .from_pretrained(
            path / "base", quantization_config=drlora_torch.Experts4bitConfig(**case.form)
        )
        .train()
    )
    adapter = case.attach(model)
    helpers.uneven(adapter, scale=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = adapter.merge_and_save(path / "plain")
    again = adapter.merge_and_save(path / "again", quantize=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert read(path / "plain").keys() == read(path / "base").keys()
    adapted = case.evaluate(model)
    merged, packed = (
        case.evaluate(type(base).from_pretrained(path / each)) for each in ("plain", "again")
    )
    adapter.detach()
    unadapted = case.evaluate(model)
    effect = checks.distance(unadapted, adapted)
    assert checks.distance(merged, adapted) < ROUNDING < 1e-3 * effect
    assert plain.storage == "float32"
    assert plain.rounding < 1e-6  # what float32 rounds of W + s B A
    assert again.storage == case.form["quant_type"]
    assert 0.01 < again.rounding < 1.0  # 4 bits round W + s B A visibly
    assert checks.distance(packed, adapted) < effect
    for report in (plain, again):
        if report.logits_effect is not None:
            assert report.logits_error is not None
            assert report.logits_error < report.logits_effect


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
