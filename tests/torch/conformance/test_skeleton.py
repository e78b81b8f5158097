"""Models that ``drlora inspect`` builds from a configuration have the numbers of loaded ones."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import drlora_torch
from drlora_core.cli import main
from drlora_torch import inspection
from drlora_torch.embedded import MODEL_DIR
from drlora_torch.errors import ModelError
from drlora_torch.models.discovery import find_layers
from drlora_torch.models.shapes import build_skeleton
from tests.torch.conformance import tiny
from tests.torch.conventions.families import build as build_odd
from tests.torch.quantized import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def figures(model: Any) -> tuple[Any, ...]:
    """All that ``inspect`` shows of a model."""
    layers = find_layers(model, on_meta=True)
    return (
        inspection.inspect(model, 4),
        inspection.count_parameters(model, layers),
        inspection.count_bytes(model),
    )


def same(folder: Path, quantization: str, **options: Any) -> list[dict[str, Any]]:
    built = build_skeleton(str(folder), quantization)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    assert all(parameter.is_meta for parameter in built.parameters())
    assert figures(built) == figures(loaded)
    records: list[dict[str, Any]] = figures(built)[0]
    return records


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4"])
def test_the_shipped_model(quantization: str) -> None:
    options = {}
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
        options = {"quantization_config": drlora_torch.Experts4bitConfig(quantization)}
    records = same(MODEL_DIR, quantization, **options)
    stored = json.loads((MODEL_DIR / "config.json").read_text())["dtype"]
    assert {each["dtype"] for each in records} == {
        stored if quantization == "none" else quantization
    }


@pytest.mark.parametrize(
    "build",
    [lambda: tiny.build("gpt_oss"), lambda: tiny.build("deepseek_v3"), lambda: build_odd("jetmoe")],
    ids=["gpt_oss", "deepseek_v3", "jetmoe"],
)
def test_other_families(build: Callable[[], Any], tmp_path: Path) -> None:
    build().to(torch.bfloat16).save_pretrained(tmp_path)
    assert same(tmp_path, "none")


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_packed_checkpoints(kind: str, tmp_path: Path) -> None:
    if kind == "fp8":
        checkpoints.write_fp8(checkpoints.qwen3_moe(), tmp_path)
    else:
        checkpoints.write_mxfp4(tmp_path)
    records = same(tmp_path, kind, config=drlora_torch.packed_config(tmp_path))
    assert {each["dtype"] for each in records} == {kind}
    other = {"fp8": "mxfp4", "mxfp4": "fp8"}[kind]
    with pytest.raises(ModelError, match=f"is quantized with {kind}; use --quantization {kind}"):
        build_skeleton(str(tmp_path), other)


@pytest.mark.parametrize("kind", ["nf4", "Linears", "both"])
def test_checkpoints_in_4_bits(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    linears = BitsAndBytesConfig(load_in_4bit=True)
    how = {
        "nf4": drlora_torch.Experts4bitConfig(),
        "Linears": linears,
        "both": drlora_torch.Experts4bitConfig(rest=linears),
    }[kind]
    model = checkpoints.qwen3_moe().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    load = AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path / "plain", quantization_config=how, dtype="auto")
    loaded.save_pretrained(tmp_path / "packed")
    assert figures(loaded)[1] == sum(parameter.numel() for parameter in model.parameters())
    assert same(tmp_path / "packed", "none") == figures(loaded)[0]


def test_no_weights_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((MODEL_DIR / "config.json").read_bytes())
    shown = []
    for place in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", str(place), "--json"])
        assert stopped.value.code == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert [layer["num_experts"] for layer in shown[0]] == [16] * 4
    assert [key for key in shown[0][0] if not re.fullmatch("[a-z_]+", key)] == []


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("width", [60, 80])
def test_it_fits_narrow_consoles(
    encoding: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(MODEL_DIR)])
    assert stopped.value.code == 0
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    lines = text.splitlines()[1:]  # without the path of the model
    assert max(map(len, lines)) <= width
    for word in ("model.layers.*.mlp.experts", "OlmoeExperts", "622,592", "interface"):
        assert word in text
