"""``drlora finetune``, ``inspect`` and ``export`` on experts that are stored in fewer bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

import drlora_torch
from drlora_core.cli import main
from drlora_torch.errors import ModelError
from drlora_torch.finetune import folder, job
from drlora_torch.finetune.model import load_base, load_model
from drlora_torch.finetune.sharding import Sharding
from tests.finetune.test_cli import QUICK, refused
from tests.finetune.test_finetune import kill, options_for
from tests.torch.quantized import checkpoints

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)


@pytest.mark.slow
def test_a_run_on_4_bits_is_saved_resumed_and_exported_as_any(
    moe_folder: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["finetune", str(moe_folder), str(sums), "--output", str(run), *QUICK]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--load-in-4bit", "--quantization", "fp4"])
    assert stopped.value.code in (0, None), capsys.readouterr().err
    options = folder.read(run).options
    assert (options.load_in_4bit, options.quantization) == (True, "fp4")
    base = load_base(options)
    assert {layer.dtype for layer in drlora_torch.discover(base)} == {"fp4"}
    adapter = drlora_torch.load(base, run / "adapter")  # of the same weights: nothing is said
    assert adapter.engine.step_count == 4
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(run)])
    assert stopped.value.code in (0, None), capsys.readouterr().err
    assert (run / "peft" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    moe_folder: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_for(moe_folder, sums, quantization="nf4")
    (whole,) = job.run(options, tmp_path / "whole", Console(quiet=True))
    kill(monkeypatch, 6, options, tmp_path / "stopped")
    (resumed,) = job.run(options, tmp_path / "stopped", Console(quiet=True), resume=True)
    assert resumed.ranks == whole.ranks
    assert resumed.loss_after == whole.loss_after


def test_inspect_tells_the_storage(moe_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(moe_folder), "--quantization", "nf4", "--json"])
    layers = json.loads(capsys.readouterr().out)
    assert [layer["dtype"] for layer in layers] == ["nf4", "nf4"]
    floats = 8 * 3 * 32 * 24 * 4  # bytes of a layer in float32
    assert all(0.125 < layer["nbytes"] / floats < 0.14 for layer in layers)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_packed_checkpoints_stay_packed(kind: str, tmp_path: Path) -> None:
    if kind == "fp8":
        checkpoints.write_fp8(checkpoints.qwen3_moe(), tmp_path)
    else:
        checkpoints.write_mxfp4(tmp_path)
    model = load_model(str(tmp_path), quantization=kind)
    assert {layer.dtype for layer in drlora_torch.discover(model)} == {kind}
    other = {"fp8": "mxfp4", "mxfp4": "fp8"}[kind]
    with pytest.raises(ModelError, match=f"is quantized with {kind}; use --quantization {kind}"):
        load_model(str(tmp_path), quantization=other)
    with pytest.raises(ModelError, match=f"--load-in-4bit packs what --quantization {kind} keeps"):
        load_model(str(tmp_path), quantization=kind, in_4bit=True)


def test_what_cannot_be_combined_is_refused(
    moe_folder: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["finetune", str(moe_folder), str(sums), "--output", str(run), *QUICK]
    said = refused([*command, "--quantization", "mxfp4"], capsys)
    assert "is not quantized" in said
    assert not run.exists()
    with pytest.raises(ModelError, match=r"packed experts cannot be spread with --ep-size=2"):
        load_model(str(moe_folder), sharding=Sharding(ep_size=2), quantization="nf4")
