"""Modules of the base that are trained whole beside the LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import drlora_torch
from drlora_core import UnknownLayerError
from tests.torch import helpers, models
from tests.torch.test_life import Picture

WHOLE = ("lm_head", "embed_tokens")
NAMES = {"lm_head.weight", "model.embed_tokens.weight"}


def trained(steps: int = 5, **options: Any) -> tuple[Any, drlora_torch.Adapter]:
    model = models.build().train()
    adapter = helpers.attach(model, modules_to_save=WHOLE, **options)
    optimizer = helpers.adamw(adapter)
    for seed in range(steps):
        helpers.step(model, optimizer, seed)
    return model.eval(), adapter


def values(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n in NAMES}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(models.tokens()).logits
    return out


def test_only_the_named_modules_learn() -> None:
    model, adapter = trained(steps=0)
    learning = {n for n, p in model.named_parameters() if p.requires_grad and ".drlora." not in n}
    assert learning == NAMES
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in adapter.parameters()
    }
    assert adapter.router_parameters() == {}


def test_detach_and_disabled_give_the_base_back() -> None:
    model = models.build()
    picture, before = Picture(model), logits(model)
    adapter = helpers.attach(model.train(), modules_to_save=WHOLE)
    base, optimizer = values(model), helpers.adamw(adapter)
    for seed in range(3):
        helpers.step(model, optimizer, seed)
    assert not any(torch.equal(base[name], value) for name, value in values(model).items())
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    adapter.detach()
    model.train(picture.training[0])
    picture.assert_unchanged(model)


def test_the_file_holds_them(tmp_path: Path) -> None:
    model, adapter = trained()
    adapter.save_pretrained(tmp_path)
    fresh = models.build()
    loaded = drlora_torch.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert loaded.options.modules_to_save == WHOLE
    optimizers = [helpers.adamw(each) for each in (adapter, loaded)]
    for each, optimizer in zip((model, fresh), optimizers, strict=True):
        helpers.step(each.train(), optimizer, 9)
    assert torch.equal(logits(fresh), logits(model))


def test_restore_brings_them_back(tmp_path: Path) -> None:
    model, adapter = trained()
    adapter.save_pretrained(tmp_path)
    before = logits(model)
    helpers.step(model.train(), helpers.adamw(adapter), 9)
    assert not torch.equal(logits(model), before)
    adapter.restore(tmp_path)
    assert torch.equal(logits(model), before)


def test_another_shape_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    _, adapter = trained()
    adapter.save_pretrained(tmp_path)
    other = models.build()
    other.resize_token_embeddings(other.config.vocab_size + 1)
    picture = Picture(other)
    with pytest.raises(drlora_torch.CheckpointError, match=r"module/\S+ has shape"):
        drlora_torch.load(other, tmp_path)
    picture.assert_unchanged(other)


def test_merged_models_keep_them(tmp_path: Path) -> None:
    model, adapter = trained()
    adapter.merge_and_save(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    kept = values(model)
    assert all(torch.equal(kept[name], value) for name, value in values(whole).items())
    adapter.merge()
    assert all(torch.equal(kept[name], value) for name, value in values(model).items())
    torch.testing.assert_close(logits(whole), logits(model), rtol=0, atol=0)


def test_tied_weights_are_trained_once(tmp_path: Path) -> None:
    model = models.build(tie_word_embeddings=True).train()
    adapter = helpers.attach(model, modules_to_save=WHOLE)
    parameters = adapter.parameters()
    assert len({id(p) for p in parameters}) == len(parameters)
    helpers.step(model, helpers.adamw(adapter))
    adapter.save_pretrained(tmp_path)
    fresh = models.build(tie_word_embeddings=True)
    drlora_torch.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("lm_haed", UnknownLayerError, "no module 'lm_haed'; did you mean 'lm_head'"),
        ("experts", drlora_torch.AttachError, "holds the adapted experts"),
        ("model", drlora_torch.AttachError, "holds the adapted experts"),
        ("act_fn", drlora_torch.AttachError, "has no parameters"),
    ],
)
def test_names_that_cannot_be_trained_are_refused(
    names: str, error: type[Exception], message: str
) -> None:
    model = models.build()
    picture = Picture(model)
    with pytest.raises(error, match=message):
        helpers.attach(model, modules_to_save=names)
    picture.assert_unchanged(model)


def test_buffers_that_would_be_lost_are_refused() -> None:
    model = models.build()
    model.norm_of_mine = torch.nn.BatchNorm1d(4)
    with pytest.raises(drlora_torch.AttachError, match="has buffers \\('num_batches_tracked'\\)"):
        helpers.attach(model, modules_to_save="norm_of_mine")


@pytest.mark.parametrize("steps", [0, 1])
def test_a_module_that_is_replaced_after_attach_is_noticed(
    steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, adapter = trained(steps)
    optimizer = helpers.adamw(adapter)
    model.train().resize_token_embeddings(70)
    message = "replaced or resized since attach"
    with pytest.raises(drlora_torch.AttachError, match=message):
        adapter.parameters()
    with pytest.raises(drlora_torch.AttachError, match=message):
        adapter.save_pretrained(tmp_path)
    model(**helpers.batch()).loss.backward()
    with pytest.raises(drlora_torch.AttachError, match=message):
        optimizer.step()
    with pytest.raises(drlora_torch.AttachError, match=message):
        model.load_state_dict(model.state_dict())
    adapter.detach()  # the way out
    assert "was resized since attach and stays as it is" in caplog.text
    assert helpers.attach(model, modules_to_save=WHOLE).parameters()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_modules_of_peft_are_left_to_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(models.build(), config)
    with pytest.raises(drlora_torch.AttachError, match="PEFT adapts or trains module 'lm_head'"):
        helpers.attach(model, modules_to_save="lm_head")
