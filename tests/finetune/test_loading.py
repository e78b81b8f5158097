"""A model whose files do not fit together is refused before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

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
        ({"num_hidden_layers": 3}, r"lack 7 weights .* first 'model.layers.2.*is a file missing"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000; accepted: at most 400"),
        (
            {"intermediate_size": 48},
            r"4 weights of another shape .*: \[8, 32, 24\], not \[8",
        ),
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


def test_so_they_are_in_a_file_that_takes_the_place_of_config_json(
    moe_folder: Path, tmp_path: Path
) -> None:
    """Transformers reads it where its version is at least that in the name."""
    name = changed(moe_folder, tmp_path / "model", configuration_files=["config.4.0.0.json"])
    config = json.loads((moe_folder / "config.json").read_text()) | {"num_hidden_layers": 10**8}
    Path(name, "config.4.0.0.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="accepted: at most 400"):
        load_config(name)


def test_a_bias_of_the_router_may_be_left_out(tmp_path: Path) -> None:
    """It is zero then; many checkpoints of DeepSeek's kind have none."""
    config = transformers.DeepseekV3Config(
        vocab_size=32, hidden_size=32, intermediate_size=24, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, n_group=2, topk_group=1, num_experts_per_tok=2,
        n_shared_experts=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    bias = next(name for name in weights if name.endswith("e_score_correction_bias"))
    save_file({key: value for key, value in weights.items() if key != bias}, file, {"format": "pt"})
    model = load_model(str(tmp_path))
    assert not model.state_dict()[bias].any()


def test_so_they_are_in_files_of_the_hub(
    moe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = changed(moe_folder, tmp_path / "model", num_hidden_layers=10**8)
    found = json.loads(Path(name, "config.json").read_text()), {}
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda _: found)
    monkeypatch.delattr(transformers.AutoConfig, "from_pretrained")  # is not reached
    with pytest.raises(ModelError, match="accepted: at most 400"):
        load_config("someone/model")
