"""What serving engines read of our exports, by their rules, is our update of every expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import drlora_torch
from tests.ecosystem import engines
from tests.ecosystem.in_peft import CASES
from tests.torch import helpers, models

EXPERTS = models.EXPERTS
QWEN, MIXTRAL = ("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3")
FAMILIES = {
    "olmoe": ("model.layers.{}.mlp.experts", QWEN),
    "qwen3_moe": ("model.layers.{}.mlp.experts", QWEN),
    "mixtral": ("model.layers.{}.block_sparse_moe.experts", MIXTRAL),
    "phimoe": ("model.layers.{}.block_sparse_moe.experts", MIXTRAL),
}
"""Names in the checkpoint, which the engines keep."""


def adapted(name: str, **options: Any) -> drlora_torch.Adapter:
    return CASES[name].uneven(dtype=torch.float32, alpha=3.0, **options)


def update(adapter: drlora_torch.Adapter, number: int, projection: str, expert: int) -> Tensor:
    layer = list(adapter.layers.values())[number].lora
    return layer.delta_weight(projection, expert)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_reads_one_lora_per_expert(tmp_path: Path, name: str, rank: int | None) -> None:
    stem, (gate, down, up) = FAMILIES[name]
    adapter = adapted(name, config={"r_init": 1, "r_target": 3, "r_max": 6 if rank is None else 3})
    report = adapter.export_peft(tmp_path, per_expert=True, rank=rank)
    largest = max(report.ranks.values())
    loaded = engines.vllm_2d(tmp_path, EXPERTS, (gate, down, up), max_lora_rank=largest)
    assert set(loaded) == {stem.format(number) for number in range(2)}
    for number in range(2):
        layer = loaded[stem.format(number)]
        assert layer[gate].lora_A.shape == (EXPERTS, largest, models.HIDDEN)
        for expert in range(EXPERTS):
            both = update(adapter, number, "gate_up_proj", expert)
            have = torch.cat([layer[gate].delta(expert), layer[up].delta(expert)])
            torch.testing.assert_close(have, both)
            want = update(adapter, number, "down_proj", expert)
            torch.testing.assert_close(layer[down].delta(expert), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_sglang_reads_one_lora_per_expert(tmp_path: Path, name: str) -> None:
    adapter = adapted(name, rslora=True)
    report = adapter.export_peft(tmp_path, per_expert=True)
    rank = max(report.ranks.values())
    for number, layer in engines.sglang(tmp_path, EXPERTS).items():
        for expert in range(EXPERTS):
            lora_A, lora_B, scaling = layer["gate_up_proj"]
            # two ranks on top of each other: gate's rows of B meet the first, up's the second
            gate, up = lora_A[expert].split(rank)
            rows = lora_B[expert].chunk(2)
            have = scaling * torch.cat([rows[0] @ gate, rows[1] @ up])
            torch.testing.assert_close(have, update(adapter, number, "gate_up_proj", expert))
            want = update(adapter, number, "down_proj", expert)
            torch.testing.assert_close(layer["down_proj"].delta(expert), want)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_vl_moe", "olmoe"])
def test_vllm_reads_stacked_experts(tmp_path: Path, name: str) -> None:
    """One rank for all layers, since not every version of vLLM knows ``rank_pattern``."""
    adapter = adapted(name)
    rank = max(int(ranks.max()) for ranks in adapter.ranks().values())
    report = adapter.export_peft(tmp_path, rank=rank)
    assert report.largest_error == 0.0
    config, _ = engines.read(tmp_path)
    assert config["rank_pattern"] == {}
    loaded = engines.vllm_3d(tmp_path, EXPERTS, max_lora_rank=rank)
    for number, of in enumerate(loaded[name] for name in sorted(loaded)):
        for expert in range(EXPERTS):
            for projection in ("gate_up", "down"):
                want = update(adapter, number, f"{projection}_proj", expert)
                torch.testing.assert_close(of[projection].delta(expert), want)


def test_what_vllm_refuses(tmp_path: Path) -> None:
    """The readers here tell a wrong directory from a right one."""
    adapter = adapted("mixtral", router="trainable")
    adapter.export_peft(tmp_path, per_expert=True)
    with pytest.raises(ValueError, match="modules_to_save"):
        engines.vllm_2d(tmp_path, EXPERTS, MIXTRAL, max_lora_rank=16)
    adapter = adapted("mixtral")
    adapter.export_peft(tmp_path, per_expert=True)
    with pytest.raises(ValueError, match="max_lora_rank"):
        engines.vllm_2d(tmp_path, EXPERTS, MIXTRAL, max_lora_rank=2)
    with pytest.raises(ValueError, match="expected target modules"):
        engines.vllm_2d(tmp_path, EXPERTS, QWEN, max_lora_rank=16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "deepseek_v3"])
def test_peft_converts_one_lora_per_expert(tmp_path: Path, name: str) -> None:
    """For the families in its own table of checkpoints from before Transformers 5."""
    case = CASES[name]
    with case.context():
        adapter = case.uneven()
        adapter.export_peft(tmp_path, per_expert=True)
        ours = case.outputs(adapter.model)
        assert case.distance(case.in_peft(tmp_path), ours) < case.rounding


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("gpt_oss", "model.layers.0.mlp.experts.3.gate_proj"),
        ("nemotron_h", "backbone.layers.0.mixer.experts.3.up_proj"),
        ("llama4", "model.layers.0.feed_forward.experts.3.up_proj"),
        ("longcat_flash", "model.layers.0.mlp.experts.3.up_proj"),
        ("jetmoe", "model.layers.0.mlp.3.input_linear"),
        ("dbrx", "transformer.blocks.0.ffn.experts.mlp.3.v1"),
        ("switch_transformers", "encoder.block.1.layer.1.mlp.experts.expert_3.wi"),
    ],
)
def test_names(tmp_path: Path, name: str, module: str) -> None:
    adapter = adapted(name)
    adapter.export_peft(tmp_path, per_expert=True)
    config, held = engines.read(tmp_path)
    assert f"base_model.model.{module}.lora_A.weight" in held
    assert module.rpartition(".")[2] in config["target_modules"]
    parts = len({key.rpartition(".lora_")[0].rpartition(".")[2] for key in held})
    assert len(held) == 2 * parts * EXPERTS * len(adapter.layers)
    assert config["rank_pattern"] == {}


def test_interleaved_gate_and_up(tmp_path: Path) -> None:
    adapter = adapted("gpt_oss")
    adapter.export_peft(tmp_path, per_expert=True)
    loaded = engines.vllm_2d(tmp_path, EXPERTS, QWEN, max_lora_rank=8)
    layer = loaded["model.layers.1.mlp.experts"]
    for expert in range(EXPERTS):
        both = update(adapter, 1, "gate_up_proj", expert)
        torch.testing.assert_close(layer["gate_proj"].delta(expert), both[0::2])
        torch.testing.assert_close(layer["up_proj"].delta(expert), both[1::2])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks by a name of yesterday
@pytest.mark.parametrize("first", ["peft", "drlora"])
def test_names_inside_a_peft_model(tmp_path: Path, first: str) -> None:
    model = models.build("mixtral")
    if first == "drlora":
        adapter = helpers.attach(model)
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    if first == "peft":
        adapter = helpers.attach(wrapped)
    adapter.export_peft(tmp_path, per_expert=True)
    _, held = engines.read(tmp_path)
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts"
    assert f"{stem}.0.w1.lora_A.weight" in held
