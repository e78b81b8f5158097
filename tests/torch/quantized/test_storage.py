"""What is said of how experts are stored, by us and of other libraries' ways."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import drlora_torch
from drlora_torch.errors import ModelError
from tests.torch import helpers, models
from tests.torch.quantized import checkpoints

NOTICES = "drlora_torch.step.notices"


def load_linears_in_4bit(folder: Path) -> Any:
    """What bitsandbytes' integration of Transformers makes of a mixture of experts."""
    checkpoints.qwen3_moe().save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True)
    )


def test_experts_that_stay_as_they_are_in_a_quantized_model_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_linears_in_4bit(tmp_path)
    with caplog.at_level(logging.WARNING, NOTICES):
        adapter = helpers.attach(model)
    (said,) = [each.getMessage() for each in caplog.records if each.name == NOTICES]
    assert "quantized (bitsandbytes), but its experts are not: experts in bfloat16" in said
    assert "quantize_experts(model)" in said
    adapter.detach()
    caplog.clear()
    drlora_torch.quantize_experts(model)
    with caplog.at_level(logging.INFO, NOTICES):
        adapter = helpers.attach(model)
    (said,) = [each.getMessage() for each in caplog.records if each.name == NOTICES]
    assert said == "2 layers, experts in nf4 (0.00 GB)"
    assert repr(adapter).endswith(", 0 events, experts in nf4 (0.00 GB))")


def test_trainer_takes_packed_experts(tmp_path: Path) -> None:
    checkpoints.qwen3_moe().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=drlora_torch.Experts4bitConfig(), dtype="float32"
    )
    adapter = helpers.attach(model.train())
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(40).view(8, 5)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert adapter.engine.step_count == 3


def test_weights_of_torchao_are_refused() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8Tensor, PerRow

    model = models.build("qwen3_moe", dtype=torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    weight = Int8Tensor.from_hp(experts.down_proj.data, granularity=PerRow())
    experts.down_proj = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ModelError, match=r"down_proj is a Int8Tensor of torchao.*quantize_experts"):
        helpers.attach(model)
    with pytest.raises(ModelError, match="Int8Tensor of torchao"):
        drlora_torch.quantize_experts(model)


def test_parametrized_weights_are_refused() -> None:
    """bitsandbytes' own way to pack a parameter unpacks all experts at every access."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = models.build("qwen3_moe")
    parametrize.replace_parameter_4bit(model.model.layers[0].mlp.experts, "gate_up_proj")
    with pytest.raises(ModelError, match=r"computed anew at every access \(Bnb4bitParam"):
        helpers.attach(model)


def test_an_adapter_on_experts_that_are_stored_otherwise(tmp_path: Path) -> None:
    """Allowed, and said; of the same storage, other weights are an error."""
    model = models.build("qwen3_moe")
    adapter = helpers.attach(model)
    adapter.save_pretrained(tmp_path)
    adapter.detach()
    drlora_torch.quantize_experts(model)
    with pytest.warns(UserWarning, match="stored as float32, and those of this model are nf4"):
        loaded = drlora_torch.load(model, tmp_path)
    loaded.save_pretrained(tmp_path / "packed")
    loaded.detach()
    drlora_torch.load(model, tmp_path / "packed").detach()
    other = models.build("qwen3_moe", seed=1)
    drlora_torch.quantize_experts(other)
    with pytest.raises(drlora_torch.CheckpointError, match="the base model is another"):
        drlora_torch.load(other, tmp_path / "packed")
