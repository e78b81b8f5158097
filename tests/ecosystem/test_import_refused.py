"""PEFT directories that are not imported: damaged, foreign, of other modules, or not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import drlora_torch
from tests.ecosystem.test_export_peft import change, uneven
from tests.torch import helpers, models


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    uneven().export_peft(tmp_path)
    return tmp_path


def test_imports_that_are_refused(exported: Path) -> None:
    def refused(match: str, family: str = "olmoe", **options: Any) -> None:
        adapter = helpers.attach(models.build(family), **options)
        before = [p.clone() for p in adapter.parameters()]
        with pytest.raises(drlora_torch.CheckpointError, match=match):
            adapter.import_peft(exported)
        assert all(map(torch.equal, before, adapter.parameters()))

    refused("also adapts .*experts", targets=["down_proj"])
    refused("also adapts .*layers.1", layers=["model.layers.0.*"])
    refused("LoRA of the adapted experts|also adapts", "nemotron_h")
    held = load_file(exported / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    for value, match in (
        (held[key][:-1], "8 experts"),
        (held[key] * np.nan, "not finite"),
        (held[key] * 1e30, "values above 1e"),
        (held[key][:, :-1], "features"),
        (held[key][:8], "rank"),
    ):
        save_file({**held, key: value.contiguous()}, exported / "adapter_model.safetensors")
        refused(match)
    save_file({k: v for k, v in held.items() if k != key}, exported / "adapter_model.safetensors")
    refused("no LoRA of 8 experts")
    save_file(held, exported / "adapter_model.safetensors")
    for fields, match in (
        ({"use_dora": True}, "plain LoRA"),
        ({"peft_type": 3}, "peft_type: must be a valid string"),
        *(({"r": r}, "r: must be") for r in (0, -5, 2**40, True, "8", None, 10**400)),
        *(({"lora_alpha": a}, "lora_alpha: ") for a in ("x", True, None, np.nan, np.inf, 10**400)),
        ({"lora_alpha": 1e300}, "lora_alpha: must be at least -100000000.0 and at most 1"),
        ({"lora_alpha": 1e9}, "lora_alpha: must be at least -100000000.0 and at most 1"),
        ({"target_parameters": 7}, "target_parameters: must be a valid list"),
        ({"target_parameters": [7]}, "target_parameters.0: must be a valid string"),
        ({"target_modules": 5}, "target_modules"),
        ({"use_rslora": "x"}, "use_rslora: must be a valid boolean"),
        ({"rank_pattern": [1]}, "rank_pattern: must be a valid dict"),
        ({"rank_pattern": {"up_proj": 0}}, "rank_pattern.up_proj: must be"),
        ({"rank_pattern": {"(": 1}}, "no pattern of names at character 1; accepted: dotted names"),
        ({"alpha_pattern": {"(.+)+$": 1}}, "no pattern of names at character 2; accepted: dotted"),
    ):
        before = (exported / "adapter_config.json").read_text()
        change(exported, **fields)
        refused(match)
        (exported / "adapter_config.json").write_text(before)
    (exported / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    refused("damaged")
    (exported / "adapter_model.safetensors").unlink()
    refused("has no adapter_model")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.gate.weight", "lm_head.weight"])
def test_routers_and_modules_that_are_not_finite(tmp_path: Path, key: str, value: float) -> None:
    options: dict[str, Any] = {"router": "trainable", "modules_to_save": ["lm_head"]}
    uneven(**options).export_peft(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    held[f"base_model.model.{key}"][0, 0] = value
    save_file(held, tmp_path / "adapter_model.safetensors")
    adapter = helpers.attach(models.build(), **options)
    before = {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}
    with pytest.raises(drlora_torch.CheckpointError, match=f"^{key}: .* not finite"):
        adapter.import_peft(tmp_path)
    now = adapter.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("attention_rank", [None, 2])
def test_what_float16_cannot_hold(tmp_path: Path, attention_rank: int | None) -> None:
    uneven(attention_rank=attention_rank).export_peft(tmp_path)
    change(tmp_path, lora_alpha=1e7, alpha_pattern={})
    adapter = helpers.attach(models.build(), dtype="float16", attention_rank=attention_rank)
    before = [p.clone() for p in adapter.parameters()]
    with pytest.raises(drlora_torch.CheckpointError, match=r"not finite in torch\.float16"):
        adapter.import_peft(tmp_path)
    assert all(map(torch.equal, before, adapter.parameters()))
    helpers.attach(models.build(), attention_rank=attention_rank).import_peft(tmp_path)
