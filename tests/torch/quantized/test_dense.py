"""LoRA of Linears that are packed by bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import drlora_torch
from tests.torch import helpers, models
from tests.torch.dense import RANK, fill, linears, logits

FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32")


def load(folder: Path, config: Any) -> Any:
    if not folder.exists():
        models.build(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("experts", ["plain", "nf4"])
def test_linears_in_4_bits(tmp_path: Path, experts: str) -> None:
    """They learn, are saved, and are merged into an unpacked checkpoint, but not in place."""
    model = load(tmp_path / "base", FOUR)
    if experts == "nf4":
        drlora_torch.quantize_experts(model)
    name = "model.layers.1.self_attn.q_proj"
    packed = model.get_submodule(name).weight
    unpacked = dequantize_4bit(packed.data, packed.quant_state).float()
    adapter = fill(helpers.attach(model, attention_rank=RANK))
    assert len(linears(adapter)) == 8
    optimizer = helpers.adamw(adapter)
    losses = [helpers.step(model.train(), optimizer) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    ours = logits(model)
    with pytest.raises(drlora_torch.AttachError, match="cannot be written into"):
        adapter.merge()
    report = adapter.merge_and_save(tmp_path / "merged")
    assert torch.equal(logits(model), ours)
    assert report.logits_error is not None
    assert report.logits_error < 0.1 * report.logits_effect
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not getattr(whole, "is_quantized", False)
    update = linears(adapter)[name].lora.delta_weight()
    assert update.abs().max() > 0.05
    have = whole.get_submodule(name).weight.float() - unpacked
    # on CPUs, bitsandbytes rounds its scales to bfloat16 at the first forward in evaluation mode
    torch.testing.assert_close(have, update, rtol=0, atol=5e-3)
    if experts == "nf4":
        with pytest.raises(drlora_torch.ModelError, match="quantize=True packs experts again"):
            adapter.merge_and_save(tmp_path / "packed", quantize=True)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.detach()
    drlora_torch.load(model, tmp_path / "adapter")
    assert torch.equal(logits(model), ours)


def test_packed_experts_beside_plain_linears_are_merged_with_them(tmp_path: Path) -> None:
    model = load(tmp_path / "base", drlora_torch.Experts4bitConfig())
    adapter = fill(helpers.attach(model, attention_rank=RANK))
    for quantize in (False, True):
        report = adapter.merge_and_save(tmp_path / f"{quantize}", quantize=quantize)
        assert report.logits_error < 0.5 * report.logits_effect


def test_linears_in_8_bits_learn_but_cannot_be_unpacked(tmp_path: Path) -> None:
    model = load(tmp_path / "base", BitsAndBytesConfig(load_in_8bit=True))
    adapter = fill(helpers.attach(model, attention_rank=RANK))
    helpers.step(model.train(), helpers.adamw(adapter))
    with pytest.raises(drlora_torch.ModelError, match=r"cannot be unpacked, Linear8bitLt"):
        adapter.merge_and_save(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
