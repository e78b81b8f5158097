"""Wrong input to inspect and export: one sentence, exit status 2, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from drlora_torch.cli.export import describe_loss
from drlora_torch.embedded import MODEL_DIR
from drlora_torch.finetune.recipe import combine, to_yaml
from drlora_torch.storage import adapter_file
from tests.bad_files import CONTENTS, check_refused, write_all

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
INSPECT = {
    "none/at/all": "is no file or folder here, and on the hub: ",
    "nobody/no-such-model": "is no file or folder here, and on the hub: ",
    "folder": "'folder' is not the folder of a model: it has no config.json",
    "empty.json": "empty.json is not JSON: ",
    "truncated.json": "truncated.json is not JSON: ",
    "list.json": "list.json is a JSON list, not a model's configuration",
    "number.json": "number.json is a JSON int, not a model's configuration",
    "binary.json": "binary.json is not JSON: ",
    "nan.json": "Field 'num_experts' expected int, got float",
    "negative.json": "negative.json",
    "truncated": "truncated/config.json is not JSON: ",
    "unheard": "does not recognize this architecture",
    "shipped --rank 0": "--rank: ",
    "shipped --rank many": "--rank: ",
    "shipped --quantization nf5": "--quantization: ",
    "shipped --quantization fp8": "is not quantized",
    "shipped --quantisation nf4": "did you mean --quantization? See drlora inspect --help",
    "": "missing argument 'MODEL'",
}
EXPORT = {
    "none": "'none' is not the folder of a run: it has no run.yaml",
    "folder": "'folder' is not the folder of a run: it has no run.yaml",
    "empty.json": "'empty.json' is not the folder of a run",
    "run-empty": "cannot be read",
    "run-truncated": "cannot be read",
    "run-list": "must hold options, one NAME: VALUE in a line",
    "run-binary": "cannot be read",
    "run-nan": "no option",
    "young": "has saved no adapter yet",
    "moved": "is not the folder of a model: it has no config.json",
    "damaged": "drlora_adapter.safetensors",
    "young --output folder/x --rank 0": "--rank: ",
    "young --rank -1": "--rank: ",
    "young --rank 1.5": "--rank: ",
    "young --lora-r 4": "did you mean --rank? See drlora export --help",
    "finished --output taken.html": "'taken.html' exists; use another --output",
    "finished --output young": "'young' exists; use another --output",
    "finished --output taken.html/peft": "taken.html",
}
CASES = [
    (name, line, message)
    for name, lines in {"inspect": INSPECT, "export": EXPORT}.items()
    for line, message in lines.items()
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_all(folder)
    configs: dict[str, Any] = {
        "unheard": {"model_type": "unheard_of"},
    }
    for name, values in configs.items():
        write(folder / name / "config.json", json.dumps(values).encode())
    write(folder / "truncated" / "config.json", CONTENTS["truncated.json"])
    write(folder / "shipped" / "config.json", (MODEL_DIR / "config.json").read_bytes())
    for kind in ("empty", "truncated", "list", "binary", "nan"):
        write(folder / f"run-{kind}" / "run.yaml", CONTENTS[f"{kind}.json"])
    recipe = combine({})
    for name in ("young", "finished", "damaged", "moved"):
        model = {"model": str(folder / "gone")} if name == "moved" else {}
        text = to_yaml(recipe.model_copy(update=model))
        write(folder / name / "run.yaml", text.encode())
    adapter_file.write(folder / "moved" / "adapter", {"lora": torch.zeros(1)}, {"version": 1})
    for name in ("finished", "damaged"):
        write(folder / name / "adapter" / "drlora_adapter.safetensors", b"\x08" + bytes(20))
    return folder


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "line", "message"), CASES)
def test_wrong_input_is_one_sentence(
    name: str,
    line: str,
    message: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_refused(capsys, files, [name, *line.split()], message)


def test_a_large_loss_of_an_export_is_told() -> None:
    import numpy as np

    errors = {
        "layers.0": {"up": np.array([0.0, 0.08]), "down": np.array([0.02, 0.0])},
        "layers.1": {"up": np.array([0.05, 0.1]), "down": np.array([0.0, 0.0])},
    }
    assert describe_loss(errors, 12) is None
    errors["layers.1"]["down"][1] = 0.456
    assert describe_loss(errors, 12) == (
        "down of expert 1 in layer 'layers.1' has a relative error of 46 %; use a higher --rank "
        "(at 12 nothing is lost)"
    )
