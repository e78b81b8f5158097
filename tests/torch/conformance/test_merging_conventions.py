"""unmerge and merge_and_save for the conventions beside the interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import drlora_torch
from drlora_torch.models.fused import Fused
from tests.torch import helpers
from tests.torch.conventions.families import FAMILIES, batch, build


def outputs(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return model(**batch(family)).logits


def adapted(family: str) -> tuple[Any, drlora_torch.Adapter]:
    model = build(family, torch.float32).eval()
    adapter = helpers.attach(model)
    helpers.uneven(adapter, scale=0.5)
    return model, adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_unmerge_brings_back_every_bit(family: str) -> None:
    model = build(family, torch.float32).eval()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = helpers.attach(model)
    helpers.uneven(adapter, scale=0.5)
    before = outputs(model, family)
    adapter.merge()
    assert model.state_dict().keys() == base.keys()
    assert not all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    adapter.unmerge()
    assert torch.equal(outputs(model, family), before)
    adapter.detach()
    assert all(helpers.equal(model.state_dict()[key], value) for key, value in base.items())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "step3p7"])
def test_merge_and_save_writes_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    model, adapter = adapted(family)
    before = outputs(model, family)
    adapter.merge_and_save(tmp_path)
    assert torch.equal(outputs(model, family), before)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    adapter.merge()
    merged = model.state_dict()
    assert again.state_dict().keys() == merged.keys()
    assert all(helpers.equal(value, merged[key]) for key, value in again.state_dict().items())


def test_a_head_of_ones_own_saves_itself(tmp_path: Path) -> None:
    """The Step 3.7 model of these tests is a text model in a module that is not Transformers'."""
    _, adapter = adapted("step3p7")
    with pytest.raises(drlora_torch.ModelError, match="has no save_pretrained"):
        adapter.merge_and_save(tmp_path)


@pytest.mark.parametrize("keep", [True, False])
def test_weights_that_cannot_be_written_to_are_refused_before_any_is(
    keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = adapted("dbrx")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    last = list(adapter.layers.values())[-1].experts
    expert_weight = Fused.expert_weight

    def refuse(self: Fused, module: Any, projection: str, expert: int) -> Tensor:
        if module is last and projection == "w2":
            raise drlora_torch.ModelError("these weights are quantized")
        return expert_weight(self, module, projection, expert)

    monkeypatch.setattr(Fused, "expert_weight", refuse)
    with pytest.raises(drlora_torch.ModelError, match="these weights are quantized"):
        adapter.merge(keep_originals=keep)
    assert all(helpers.equal(model.state_dict()[key], value) for key, value in before.items())
    assert adapter.parameters()
