"""Weights that have diverged: no save, merge or export puts them in the place of good ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import drlora_torch
from drlora_torch.errors import NotFiniteError
from drlora_torch.storage.finite import LARGEST, is_finite
from tests.torch import helpers, models

Adapter = drlora_torch.Adapter


def trained(**options: Any) -> Adapter:
    model = models.build()
    adapter = helpers.attach(model, router="trainable", modules_to_save=["lm_head"], **options)
    optimizer = helpers.adamw(adapter)
    for seed in range(2):
        helpers.step(model, optimizer, seed)
    return adapter


def lora(adapter: Adapter, part: int) -> torch.Tensor:
    """Rows of A or of B that an expert owns."""
    _, _, layer, slots = next(helpers.projections(adapter))
    return (slots.lora_A, slots.lora_B)[part].data[helpers.owned(layer, 0)[0]]


def overflow(adapter: Adapter) -> None:
    """A and B are finite, and B A is not."""
    for _, _, _, slots in helpers.projections(adapter):
        slots.lora_A.data.clamp_(-1, 1).mul_(1e17)
        slots.lora_B.data.clamp_(-1, 1).mul_(1e17)


SPOIL: dict[str, Callable[[Adapter], object]] = {
    "A": lambda adapter: lora(adapter, 0).fill_(torch.nan),
    "B": lambda adapter: lora(adapter, 1).fill_(-torch.inf),
    "large": lambda adapter: lora(adapter, 0).fill_(3e38),
    "router": lambda adapter: adapter.layers[LAYER].router.weight.data[0].fill_(torch.nan),
    "module": lambda adapter: adapter.model.lm_head.weight.data[0].fill_(torch.nan),
}
LAYER = "model.layers.0.mlp.experts"
WRITE: dict[str, Callable[[Adapter, Path], object]] = {
    "save": lambda adapter, path: adapter.save_pretrained(path),
    "merged": lambda adapter, path: adapter.merge_and_save(path, compare=False),
    "compared": lambda adapter, path: adapter.merge_and_save(path),
    "export": lambda adapter, path: adapter.export_peft(path),
    "compressed": lambda adapter, path: adapter.export_peft(path, rank=1),
    "per expert": lambda adapter, path: adapter.export_peft(path, per_expert=True),
}


def state(adapter: Adapter) -> list[bytes]:
    """The bits of every tensor of the model: NaN equals itself."""
    tensors = adapter.model.state_dict().values()
    return [t.numpy().tobytes() for t in tensors if isinstance(t, torch.Tensor)]


def refused(adapter: Adapter, path: Path, write: Callable[[Adapter, Path], object]) -> None:
    files = {file: file.read_bytes() for file in path.rglob("*.*") if file.is_file()}
    before = state(adapter)
    with pytest.raises(NotFiniteError, match=r"not finite.* diverged; nothing was written"):
        write(adapter, path)
    assert {file: file.read_bytes() for file in path.rglob("*.*") if file.is_file()} == files
    assert state(adapter) == before


@pytest.mark.parametrize("what", SPOIL)
def test_nothing_is_written(tmp_path: Path, what: str) -> None:
    adapter = trained()
    for kind, write in WRITE.items():
        write(adapter, tmp_path / kind)
    SPOIL[what](adapter)
    for kind, write in WRITE.items():
        refused(adapter, tmp_path / kind, write)
    refused(adapter, tmp_path, lambda adapter, _: adapter.merge())
    assert adapter.layers[LAYER].lora.table.ranks().any()


def test_a_product_that_overflows_is_not_merged(tmp_path: Path) -> None:
    adapter = trained()
    for kind in ("merged", "compressed"):
        WRITE[kind](adapter, tmp_path / kind)
    overflow(adapter)
    refused(adapter, tmp_path / "merged", WRITE["merged"])
    refused(adapter, tmp_path, lambda adapter, _: adapter.merge())


def test_a_base_that_is_not_finite_is_not_merged(tmp_path: Path) -> None:
    """The second projection of the second layer: what was written before it comes back."""
    adapter = trained()
    adapter.model.model.layers[1].mlp.experts.down_proj.data[-1, 0, 0] = torch.inf
    refused(adapter, tmp_path, lambda adapter, _: adapter.merge())
    refused(adapter, tmp_path, WRITE["merged"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_finite(dtype: torch.dtype) -> None:
    values = torch.zeros(3, dtype=dtype)
    assert is_finite(values)
    assert is_finite(values[:0])
    for bad in (torch.nan, torch.inf, -torch.inf, *([-2 * LARGEST] if dtype.itemsize > 2 else [])):
        values[1] = bad
        assert not is_finite(values)
    assert is_finite(torch.tensor([7e4]))
    assert not is_finite(torch.tensor([7e4]), torch.float16)
