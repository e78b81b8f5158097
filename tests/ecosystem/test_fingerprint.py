"""An adapter knows its base model; loading onto another one is refused, or done on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import drlora_torch
from drlora_torch.adapter import state_of
from tests.torch import helpers, models
from tests.torch.test_checkpoint import rewrite


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    helpers.attach(models.build()).save_pretrained(tmp_path)
    return tmp_path


def test_other_weights_of_the_same_shape(saved: Path) -> None:
    other = models.build(seed=1)
    with pytest.raises(
        drlora_torch.CheckpointError,
        match=r"the base model is another: the expert weights of 'model.layers.0.mlp.experts' and "
        r"1 more layers are not those .* OlmoeForCausalLM, float32.*check_base=False",
    ):
        drlora_torch.load(other, saved)
    assert drlora_torch.load(other, saved, check_base=False).ranks()
    adapter = helpers.attach(models.build(seed=1))
    with pytest.raises(drlora_torch.CheckpointError, match="base model is another"):
        adapter.restore(saved)
    adapter.restore(saved, check_base=False)


@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("expert", [0, models.EXPERTS // 2, models.EXPERTS - 1])
def test_one_changed_expert_is_enough(saved: Path, projection: str, expert: int) -> None:
    model = models.build()
    getattr(model.model.layers[1].mlp.experts, projection).data[expert] += 0.5
    with pytest.raises(drlora_torch.CheckpointError, match=r"of 'model.layers.1.mlp.experts' are"):
        drlora_torch.load(model, saved)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_of_the_same_model_passes(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Save in one dtype, load in the other, both ways."""
    helpers.attach(models.build(family)).save_pretrained(tmp_path)
    assert drlora_torch.load(models.build(family, dtype), tmp_path).ranks()
    helpers.attach(models.build(family, dtype)).save_pretrained(tmp_path)
    assert drlora_torch.load(models.build(family), tmp_path).ranks()


def test_the_rest_of_the_model_does_not_count(saved: Path) -> None:
    model = models.build()
    model.lm_head.weight.data += 1.0
    model.resize_token_embeddings(80)
    assert drlora_torch.load(model, saved).ranks()


def test_one_that_is_broken_or_removed_is_refused(saved: Path) -> None:
    def put(value: Any) -> None:
        rewrite(saved, description=lambda told: told.update(base=value))

    for broken in (3, [], {}, {"experts": 3}):
        put(broken)
        with pytest.raises(drlora_torch.CheckpointError, match="fingerprint"):
            drlora_torch.load(models.build(), saved)
    put(None)
    with pytest.raises(drlora_torch.CheckpointError, match=r"no fingerprint.* check_base=False"):
        drlora_torch.load(models.build(), saved)
    assert drlora_torch.load(models.build(seed=1), saved, check_base=False).ranks()


def test_for_use_only(saved: Path) -> None:
    model = models.build()
    adapter = drlora_torch.load(model, saved, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    spy = helpers.Spy(adapter)
    with torch.no_grad():
        model(**helpers.batch())
    assert state_of(adapter).paused
    with adapter.paused():
        pass
    assert state_of(adapter).paused
    assert spy.samples == []
