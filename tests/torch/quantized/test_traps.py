"""Ways in which a packed base lost something without a word, once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import drlora_torch
from drlora_torch.errors import AttachError, CheckpointError, ModelError
from drlora_torch.merge import packed
from tests.finetune.conftest import make_tokenizer
from tests.torch import helpers
from tests.torch.conventions import families
from tests.torch.quantized import checkpoints

IDS = torch.arange(14).view(2, 7)


def load(folder: Path, quantization: Any, **options: Any) -> Any:
    checkpoints.qwen3_moe().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, **options
    )
    return model.train()


def trained(model: Any, steps: int = 4) -> drlora_torch.Adapter:
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for seed in range(steps):
        helpers.step(model, optimizer, seed)
    return adapter


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trl_does_not_round_what_learns(tmp_path: Path) -> None:
    """It does where a model says that it was loaded in 4 bits."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    rest = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32")
    model = load(tmp_path / "base", drlora_torch.Experts4bitConfig(rest=rest), dtype="float32")
    assert model.is_loaded_in_4bit
    adapter = helpers.attach(model)
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, bf16=False
    )
    rows = [{"input_ids": row.tolist()} for row in torch.arange(40).view(8, 5)]
    data = datasets.Dataset.from_list(rows)
    trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=make_tokenizer())
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    adapter.save_pretrained(tmp_path / "adapter")
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        kinds = {tensors.get_tensor(k).dtype for k in tensors.keys() if "lora_" in k}  # noqa: SIM118
    assert kinds == {torch.float32}
    adapter.detach()
    assert model.is_loaded_in_4bit


def test_fp8_codes_are_never_taken_for_weights(tmp_path: Path) -> None:
    checkpoints.write_fp8(checkpoints.qwen3_moe(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=drlora_torch.packed_config(tmp_path)
    )
    adapter = helpers.attach(model)
    model.to(torch.float32)
    with pytest.raises(ModelError, match=r"codes of FP8 as torch.float32 numbers, without their"):
        model(input_ids=IDS)
    adapter.detach()
    with pytest.raises(ModelError, match=r"converted the model .*load it again"):
        helpers.attach(model)


def test_a_model_is_not_unpacked_under_its_adapter(tmp_path: Path) -> None:
    model = load(tmp_path, drlora_torch.Experts4bitConfig())
    adapter = trained(model)
    want = model(input_ids=IDS).logits
    with pytest.raises(AttachError, match=r"has an adapter; .*adapter\.detach\(\)"):
        model.dequantize()
    assert torch.equal(model(input_ids=IDS).logits, want)
    adapter.detach()
    model.dequantize()
    assert {layer.dtype for layer in drlora_torch.discover(model)} == {"bfloat16"}


@pytest.mark.parametrize("quantize", [False, True])
def test_a_merge_that_loses_a_small_update_is_noticed(
    quantize: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load(tmp_path / "base", drlora_torch.Experts4bitConfig())
    adapter = helpers.attach(model)
    helpers.fill(adapter, scale=0.02)
    whole = adapter.merge_and_save(tmp_path / "whole")
    assert whole.logits_effect is not None
    assert 0.002 < whole.logits_effect < 0.05
    monkeypatch.setattr(packed, "add", lambda where, weight, delta, rounding=None: weight)
    if quantize:
        with caplog.at_level(logging.WARNING):
            report = adapter.merge_and_save(tmp_path / "lost", quantize=True)
        assert report.rounding > 0.99  # nothing of the update is there
        assert "% of what the adapter changes" in caplog.text
    else:
        with pytest.raises(CheckpointError, match=r"have -?\d+% of what the adapter changes"):
            adapter.merge_and_save(tmp_path / "lost")
        assert not (tmp_path / "lost").exists()


def test_linears_that_cannot_be_unpacked_are_not_written(tmp_path: Path) -> None:
    model = load(tmp_path / "base", BitsAndBytesConfig(load_in_8bit=True))
    drlora_torch.quantize_experts(model)
    adapter = helpers.attach(model)
    with pytest.raises(ModelError, match=r"Linears that cannot be unpacked, Linear8bitLt"):
        adapter.merge_and_save(tmp_path / "merged", compare=False)
    assert not (tmp_path / "merged").exists()
    adapter.detach()
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "packed")


def test_merging_beside_linears_in_4_bits(tmp_path: Path) -> None:
    """Of experts that are as they were; and packed ones are read again."""
    model = load(tmp_path / "base", BitsAndBytesConfig(load_in_4bit=True))
    adapter = trained(model)
    report = adapter.merge_and_save(tmp_path / "merged")
    assert report.logits_error is not None
    assert report.logits_effect is not None
    assert report.logits_error < report.logits_effect
    adapter.detach()
    drlora_torch.quantize_experts(model)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert {layer.dtype for layer in drlora_torch.discover(again)} == {"nf4"}


def test_experts_that_the_checkpoint_left_as_they_were_are_merged_too(tmp_path: Path) -> None:
    checkpoints.write_fp8(checkpoints.qwen3_moe(), tmp_path / "base", left="layers.1.mlp.experts")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", config=drlora_torch.packed_config(tmp_path / "base")
    )
    assert [layer.dtype for layer in drlora_torch.discover(model)] == ["fp8", "bfloat16"]
    report = trained(model.train()).merge_and_save(tmp_path / "merged")
    assert report.logits_error is not None
    assert report.logits_effect is not None
    assert report.logits_error < report.logits_effect


@pytest.mark.slow
def test_a_training_on_experts_that_are_linears_in_4_bits_can_be_saved(tmp_path: Path) -> None:
    base: Any = families.build("switch_transformers")
    base.float().save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    assert {layer.dtype for layer in drlora_torch.discover(model)} == {"fp4"}
    adapter = helpers.attach(model)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.detach()
    drlora_torch.load(model, tmp_path / "adapter")


def test_a_merge_leaves_the_modes_of_modules(tmp_path: Path) -> None:
    model = load(tmp_path / "base", drlora_torch.Experts4bitConfig())
    adapter = helpers.attach(model)
    model.model.layers[0].self_attn.eval()
    modes = [module.training for module in model.modules()]
    adapter.merge_and_save(tmp_path / "merged")
    assert [module.training for module in model.modules()] == modes
