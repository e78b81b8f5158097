"""Code that comes with a model never runs, whatever stands on standard input."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import drlora_torch
from drlora_torch.errors import FOREIGN_CODE, ModelError
from drlora_torch.finetune.model import load_tokenizer
from tests.bad_files import check_refused

MAPS = {
    "config.json": {
        "AutoConfig": "theirs.Config",
        "AutoModel": "theirs.Model",
        "AutoModelForCausalLM": "theirs.Model",
    },
    "tokenizer_config.json": {"AutoTokenizer": ["theirs.Tokenizer"] * 2},
}
CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path({mark!r}).touch()
class Config(PretrainedConfig):
    model_type = "theirs"
class Model: ...
class Tokenizer: ...
"""


@pytest.fixture
def stranger(tmp_path: Path, moe_folder: Path) -> Callable[..., Path]:
    """Make the folder ``model`` whose code leaves the file ``ran``; the working folder has both."""

    def make(*files: str, **fields: str) -> Path:
        folder = Path(shutil.copytree(moe_folder, tmp_path / "model"))
        (folder / "theirs.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
        for name in files:
            values = json.loads((folder / name).read_text())
            changes = {"auto_map": MAPS[name], **fields}
            (folder / name).write_text(json.dumps({**values, **changes}))
        return folder

    return make


@pytest.fixture(autouse=True)
def agreeing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Standard input says yes to every question."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", ["finetune model sums.jsonl", "inspect model"])
def test_a_model_with_code_is_refused(
    line: str,
    stranger: Callable[..., Path],
    tmp_path: Path,
    sums: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stranger("config.json", model_type="theirs")
    shutil.copy(sums, tmp_path / "sums.jsonl")
    check_refused(capsys, tmp_path, line.split(), FOREIGN_CODE)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_code_is_refused(stranger: Callable[..., Path], tmp_path: Path) -> None:
    theirs = {"model_type": "theirs", "tokenizer_class": "Theirs"}
    folder = stranger("config.json", "tokenizer_config.json", **theirs)
    with pytest.raises(ModelError, match="does not run"):
        load_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()


def test_packed_config_does_not_run_it(stranger: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not run"):
        drlora_torch.packed_config(stranger("config.json", model_type="theirs"))
    assert not (tmp_path / "ran").exists()
