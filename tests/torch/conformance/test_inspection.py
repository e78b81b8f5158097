"""What ``drlora inspect`` shows, and the page of families."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from drlora_core.cli import main
from drlora_core.cli.common import format_bytes
from drlora_torch import inspection
from drlora_torch.models.counting import count_parameters
from drlora_torch.models.discovery import discover
from drlora_torch.models.quantization.in_memory import quantize_experts
from tests.torch import helpers, models
from tests.torch.conformance import page, tiny
from tests.torch.conventions import families as conventions

ROOT = Path(__file__).parents[3]


def shown(title: str, model: nn.Module, rank: int = 16) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    inspection.show(title, model, rank, console)
    return console.export_text()


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h_latent", "ernie4_5_vl_moe"])
def test_the_size_of_the_lora_is_what_attach_makes(name: str) -> None:
    model = tiny.build(name)
    records = inspection.inspect(model, rank=4)
    adapter = helpers.attach(model)  # r_target = 4
    for record in records:
        lora = adapter.layers[record["name"]].lora
        assert record["lora_parameters"] == sum(p.numel() for p in lora.parameters())


def test_layers_of_one_kind_share_a_row() -> None:
    text = shown("deepseek", models.build("deepseek_v3", num_hidden_layers=4))
    (row,) = [line for line in text.splitlines() if "mlp.experts" in line]
    for part in ("3 x model.layers.*.mlp.experts", "8 DeepseekV3Experts", "gate", "interface"):
        assert part in row
    assert f"{3 * 8 * 16 * (32 + 48 + 24 + 32):,}" in row
    assert "3 of 3 layers are adapted; LoRA at a mean rank of 16" in text
    both = shown("ernie", tiny.build("ernie4_5_vl_moe"))
    assert len([line for line in both.splitlines() if "moe.experts" in line]) == 2


def test_what_cannot_be_adapted_is_said_once() -> None:
    model = models.build()
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    text = shown("quantized", model)
    assert text.count("quantized (int8)") == 1
    assert "0 of 2 layers are adapted" in text
    assert "no mixture-of-experts layers" in shown("dense", nn.Linear(2, 2))


def test_routed_attention_is_counted_only_if_asked_for() -> None:
    text = shown("jetmoe", conventions.build("jetmoe"))
    assert "single projections, if named in layers" in text
    assert "2 of 4 layers are adapted" in text


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_bytes_and_parameters_of_packed_experts(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny.build(name).to(torch.bfloat16)
    layers = discover(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(model, layers) == parameters
    rest = 2 * parameters - sum(layer.nbytes for layer in layers)
    assert f"bfloat16, {format_bytes(sum(layer.nbytes for layer in layers))}" in shown(name, model)
    packed = quantize_experts(model)
    text = shown(name, model)
    assert f"nf4, {format_bytes(packed.after)}" in text
    assert f"the experts take {format_bytes(packed.after)}, the rest of the model" in text
    assert text.splitlines()[-1].endswith(f"the rest of the model {format_bytes(rest)}")
    assert count_parameters(model, discover(model)) == parameters
    records = inspection.inspect(model, rank=1)
    assert {record["dtype"] for record in records} == {"nf4"}
    assert sum(record["nbytes"] for record in records) == packed.after


def test_json_has_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.build().save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path), "--json", "--rank", "2"])
    assert not stopped.value.code
    layers = json.loads(capsys.readouterr().out)
    assert [layer["lora_parameters"] for layer in layers] == [8 * 2 * (32 + 48 + 24 + 32)] * 2
    assert layers[0]["projections"]["down_proj"] == [24, 32]


def test_the_page_of_families_is_the_table() -> None:
    """After a change of the table: ``python -m tests.torch.conformance.page``."""
    assert (ROOT / page.PATH).read_text(encoding="utf-8") == page.text()
