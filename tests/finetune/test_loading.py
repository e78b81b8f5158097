"""A model whose files do not fit together is refused before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from drlora_torch.errors import ModelError
from drlora_torch.finetune.model import load_config, load_model, load_tokenizer


def changed(folder: Path, to: Path, **fields: Any) -> str:
    """A copy of a model whose config.json says something else."""
    shutil.copytree(folder, to)
    config = to / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return str(to)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # Of the third layer, there are ten weights beside three of each expert.
        ({"num_hidden_layers": 3}, r"lack \d+ weights .* first 'model.layers.2.*is a file missing"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000; accepted: at most 400"),
        ({"hidden_size": 10**9, "head_dim": 16}, "other shapes than its config.json says"),
    ],
    ids=["too few weights", "too many layers", "too wide"],
)
def test_a_configuration_of_another_model_is_refused(
    moe_folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    name = changed(moe_folder, tmp_path / "model", **fields)
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_layers_are_counted_before_any_is_built(moe_folder: Path, tmp_path: Path) -> None:
    name = changed(moe_folder, tmp_path / "model", num_hidden_layers=10**8)
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError, match="accepted: at most 400"):
            load(name)


def test_so_they_are_in_files_of_the_hub(
    moe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = changed(moe_folder, tmp_path / "model", num_hidden_layers=10**8)
    monkeypatch.setattr(
        "drlora_torch.models.shapes.cached_file", lambda _, file: str(Path(name, file))
    )
    monkeypatch.delattr(transformers.AutoConfig, "from_pretrained")  # is not reached
    with pytest.raises(ModelError, match="accepted: at most 400"):
        load_config("someone/model")
