"""The benchmark of full-size models, on tiny ones; no time and no resident memory is judged."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
if not Path("/proc/self/clear_refs").exists():
    pytest.skip("memory is read as Linux tells it", allow_module_level=True)

import torch
from transformers import AutoModelForCausalLM

import drlora_torch
from benchmarks import report
from benchmarks.scale import __main__ as command
from benchmarks.scale import page
from benchmarks.scale.building import PRESETS, build
from benchmarks.scale.meter import Meter
from benchmarks.scale.running import WARM_UP, Job, plan, run
from drlora_core.memory_forecast import RunOptions
from tests.marks import slow_and_thinned

NAMES = sorted(PRESETS)
SIZES = WARM_UP | {"num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 1}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny models under the names of the real ones; results in a folder of the test."""
    for name, preset in list(PRESETS.items()):
        fields = {key: SIZES.get(key, value) for key, value in preset.fields.items()}
        fields |= {key: SIZES[key] for key in ("pad_token_id", "eos_token_id")}
        monkeypatch.setitem(PRESETS, name, dataclasses.replace(preset, fields=fields))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "return_large_blocks", lambda mebibytes: False)


def job(name: str, **changes: Any) -> Job:
    preset = PRESETS[name]
    options = {"quantization": preset.quantization, "kernel": "ragged", "tokens": 32}
    return Job(preset, None, RunOptions(**(options | changes)))


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_and_thinned(((name,) for name in NAMES), 2))
def test_parts_are_what_is_forecast(name: str) -> None:
    found = run(job(name))
    parts, planned = found.parts, found.forecast
    assert (parts.experts, parts.rest, parts.lora) == (planned.experts, planned.rest, planned.lora)
    assert parts.gradients == planned.gradients
    steps = 2 * 2 * 2  # Adam's own counts, of A and B of two projections of two layers
    assert parts.optimizer == planned.optimizer + 4 * steps
    assert found.same_logits
    assert found.effect > 0.0
    assert found.events == 1
    assert found.ranks[2] == 2 * 4 * PRESETS[name].r_target
    assert found.losses == sorted(found.losses, reverse=True)
    names = [stage.name for stage in found.meter.stages]
    assert names[:5] == ["make the model", "attach", "step 1", "step 2", "step 3"]
    assert names[-3:] == ["save the adapter", "detach", "load the adapter"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_section_is_written_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = "bfloat16"

    def main(**options: Any) -> str:
        given = {"model": NAMES[1], "layers": None, "quantization": None, "dtype": dtype}
        given |= {"tokens": 16, "blocks": 1, "page": None}
        with pytest.raises(command.typer.Exit) as ended:
            command.main(**(given | options))
        assert ended.value.exit_code == 0
        return capsys.readouterr().out

    assert f"## {NAMES[1]}, nf4, LoRA {dtype}, 1 of 2 layers" in main(layers=1)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(command, "warm_up", lambda job: None)
    main()
    main(quantization="fp4")
    main(tokens=17)
    text = (tmp_path / "scale.md").read_text()
    headings = [f"{NAMES[1]}, {kind}, LoRA {dtype}" for kind in ("nf4", "fp4")]
    assert re.findall(r"^## (.*)$", text, flags=re.M) == headings
    assert text.startswith(f"{page.TITLE}\n\n{page.ABOUT}\n\n## ")
    assert "; 17 tokens a step" in text
    assert text.count("; 16 tokens a step") == 1
    assert text.count("| expert weights |") == text.count("the same, bit for bit") == 2


def test_too_little_memory_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "available", lambda: 2**29)
    monkeypatch.setattr(command, "run", None)
    with pytest.raises(command.typer.Exit) as ended:
        command.main(model=NAMES[0])
    assert ended.value.exit_code == 2
    assert "too little memory" in capsys.readouterr().err


def test_experts_are_packed_as_the_library_packs_them() -> None:
    config = PRESETS["qwen3-30b-a3b"].config()
    model, whole = build(config, "nf4"), build(config, "none")
    drlora_torch.quantize_experts(whole)
    wanted = dict(whole.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(wanted)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name


def test_a_model_that_was_built_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model = build(PRESETS["qwen3-30b-a3b"].config(), "nf4").eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    words = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(words).logits, loaded(words).logits)
    assert {layer.dtype for layer in drlora_torch.discover(loaded)} == {"nf4"}


@pytest.mark.parametrize("name", NAMES)
def test_layers_can_be_cut(name: str) -> None:
    shortened = Job(PRESETS[name], 1, job(name).options)
    assert plan(shortened)[0].lora * 2 == plan(job(name))[0].lora


def test_a_meter_sees_what_is_allocated() -> None:
    meter, size = Meter(), 64 * 2**20
    with meter.stage("hold"):
        held = torch.ones(size // 4)
    with meter.stage("let go"):
        del held
    hold, let_go = meter.stages
    assert hold.after - hold.before > size // 2
    assert hold.peak >= hold.after
    assert let_go.after < let_go.before - size // 2
    assert meter.peak("let") == let_go.peak
