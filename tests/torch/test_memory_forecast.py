"""The forecast of ``drlora plan`` is what packing makes, and near what steps allocate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

import drlora_torch
from benchmarks.memory import peak_bytes
from drlora_core import AllocatorConfig, AllocatorEngine, memory_forecast
from drlora_core.memory_forecast import RunOptions, activation_bytes, forecast, weight_bytes
from drlora_torch.lora.kernels import grouped
from drlora_torch.models.shapes import read_shape
from drlora_torch.quantized import four_bit, holders
from tests.marks import slow_but
from tests.torch import helpers

ODD = [(3, 5), (1, 1), (65, 1), (64, 64), (127, 129), (1536, 2048), (257, 64), (128, 129)]


@pytest.mark.parametrize("quant_type", four_bit.TYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("rows", "columns"), ODD)
@pytest.mark.parametrize("experts", [1, 7])
def test_bytes_are_those_of_packed_weights(
    quant_type: Any, double_quant: bool, rows: int, columns: int, experts: int
) -> None:
    shape = (experts, rows, columns)
    form = four_bit.FourBit(quant_type, double_quant, shape, experts, torch.bfloat16)
    made = sum(tensor.nbytes for tensor in form.empty("meta").values())
    run = RunOptions(quantization=quant_type, double_quant=double_quant)
    assert made == experts * weight_bytes(rows, columns, run)


@pytest.mark.parametrize(("rows", "columns"), [(3, 32), (64, 2048)])
def test_bytes_are_those_of_mxfp4_blocks(rows: int, columns: int) -> None:
    made = holders.MXFP4((2, rows, columns)).empty("meta")
    size = weight_bytes(rows, columns, RunOptions(quantization="mxfp4"))
    assert sum(tensor.nbytes for tensor in made.values()) == 2 * size


def test_constants_are_those_of_the_kernels() -> None:
    assert memory_forecast.GROUP_BYTES == grouped.GROUP_BYTES
    assert memory_forecast.BLOCK == four_bit.BLOCK
    assert memory_forecast.NESTED_BLOCK == four_bit.NESTED_BLOCK
    assert holders.FP4_TILE[1] == memory_forecast.MXFP4_GROUP


def tiny(**changes: Any) -> Qwen3MoeConfig:
    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_hidden_layers": 3,
        "moe_intermediate_size": 48,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "vocab_size": 300,
        "use_cache": False,
    }
    return Qwen3MoeConfig(**(sizes | changes))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bytes_of_a_model_are_exact(tmp_path: Path, quantization: Any) -> None:
    config = tiny()
    config.save_pretrained(tmp_path)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
        drlora_torch.quantize_experts(model)
    ranks = AllocatorConfig(r_init=2, r_target=4)
    made = forecast(read_shape(str(tmp_path)), ranks, RunOptions(quantization=quantization))
    found = drlora_torch.discover(model)
    assert made.experts == sum(layer.nbytes for layer in found)
    rest = sum(parameter.nbytes for parameter in model.parameters()) - made.experts
    assert made.rest == rest
    adapter = drlora_torch.attach(model, AllocatorEngine(ranks))
    assert made.lora == sum(parameter.nbytes for parameter in adapter.parameters())


@pytest.mark.parametrize("vocabulary", slow_but([300, 20000], [300]))
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kernel", ["grouped", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_near_those_of_a_step(
    tmp_path: Path, vocabulary: int, checkpointing: bool, kernel: Any, dtype: Any
) -> None:
    tokens, config = 128, tiny(vocab_size=vocabulary)
    config.save_pretrained(tmp_path)
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype)).train()
    if checkpointing:
        helpers.checkpoint_activations(model, reentrant=False)
    ranks = AllocatorConfig(r_init=1, r_target=1, policy="uniform")
    adapter = drlora_torch.attach(model, AllocatorEngine(ranks), kernel=kernel)
    words = torch.randint(0, vocabulary, (1, tokens))

    def step() -> None:
        model(input_ids=words, labels=words).loss.backward()

    step()
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run = RunOptions(base_dtype=dtype, kernel=kernel, tokens=tokens, checkpointing=checkpointing)
    estimate = activation_bytes(read_shape(str(tmp_path)), run)
    assert estimate is not None
    assert estimate == pytest.approx(peak_bytes(step), rel=1 / 3)


@pytest.mark.parametrize(("kind", "chosen"), [("mixtral", 2), ("jetmoe", 2), ("gpt_oss", 4)])
def test_the_reader_of_transformers_says_what_a_token_takes(
    tmp_path: Path, kind: str, chosen: int
) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert shape.experts_per_token == chosen
    assert (shape.hidden_size, shape.vocab_size) == (config.hidden_size, config.vocab_size)
