"""``drlora export``; tests/test_examples.py runs the example that exports."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import drlora_torch
from drlora_core.cli import main
from drlora_torch.embedded import MODEL_DIR
from drlora_torch.finetune import folder
from drlora_torch.finetune.recipe import combine
from tests.torch import helpers

FILE = "drlora_adapter.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run leaves behind."""
    run = tmp_path_factory.mktemp("run")
    folder.write(run, combine({}))
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    adapter = drlora_torch.attach(model, helpers.engine())
    helpers.uneven(adapter)
    engine = adapter.engine.state_dict()
    for name, layer in adapter.layers.items():
        engine["layers"][name]["ranks"] = layer.lora.table.ranks()
    with adapter.engine.driver.acting():
        adapter.engine.load_state_dict(engine)
    adapter.save_pretrained(run / "adapter")
    return run


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["export", *arguments])
    return int(stopped.value.code or 0)


def test_a_run_is_exported(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(str(finished)) == 0
    assert (finished / "peft" / "adapter_config.json").is_file()
    assert call(str(finished), "--output", str(tmp_path / "x"), "--rank", "2") == 0
    said = capsys.readouterr()
    assert re.search(r"rank 2\nlargest relative error of an expert: \d", said.out)
    warning = r"drlora: warning: \w+ of expert \d+ in layer .* error of \d\d %; use a higher --rank"
    assert re.search(warning, said.err)
    assert call(str(finished), "--output", str(tmp_path / "z"), "--rank", "64") == 0
    assert "warning" not in capsys.readouterr().err
    assert call(str(finished), "--output", str(tmp_path / "y"), "--per-expert") == 0
    targets = json.loads((tmp_path / "y" / "adapter_config.json").read_text())["target_modules"]
    assert "gate_proj" in targets


def test_an_unfinished_run_gives_its_last_checkpoint(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes((finished / "run.yaml").read_bytes())
    for step, complete in ((2, True), (4, True), (6, False)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        shutil.copytree(finished / "adapter", folder)
        (folder / "trainer_state.json").write_text("{}" if complete else "{")
    (tmp_path / "checkpoints" / "checkpoint-2" / FILE).unlink()
    assert call(str(tmp_path)) == 0
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


def test_bad_runs_are_one_sentence(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.yaml").write_text("{")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "run.yaml").write_bytes((finished / "run.yaml").read_bytes())
    for arguments, match in (
        ([str(finished), "--output", str(tmp_path / "taken")], "exists; use another"),
        ([str(tmp_path / "empty")], "not the folder of a run"),
        ([str(tmp_path / "broken")], "cannot be read"),
        ([str(tmp_path / "young")], "has saved no adapter yet"),
    ):
        assert call(*arguments) != 0
        said = capsys.readouterr().err.strip()
        assert match in said
        assert "\n" not in said
