"""LoRA of dense Linears in PEFT directories, in the Trainer, beside PEFT, and in wrappers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import drlora_torch
from drlora_torch import CheckpointError
from drlora_torch.models import spelling
from tests.ecosystem import test_export_peft as exports
from tests.ecosystem import trainers
from tests.torch import helpers, models
from tests.torch.conformance import tiny
from tests.torch.conventions import families
from tests.torch.dense import RANK, adapted, fill, linears, logits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
OPTIONS: dict[str, Any] = {"attention_rank": RANK, "attention_alpha": 6.0}


def uneven(family: str = "olmoe", **options: Any) -> drlora_torch.Adapter:
    adapter = exports.uneven(family, **{**OPTIONS, "alpha": 3.0, **options})
    return fill(adapter)


# -- PEFT directories --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("olmoe", {}),
        ("olmoe", {"rslora": True, "attention_targets": ["q_proj"], "router": "trainable"}),
        ("qwen2_moe", {}),
        ("deepseek_v3", {"attention_rank": 7}),  # the largest rank of the experts
    ],
)
def test_peft_gives_our_logits_and_we_take_it_back(
    tmp_path: Path, family: str, options: Any
) -> None:
    adapter = uneven(family, **options)
    assert adapter.export_peft(tmp_path).largest_error == 0.0
    ours = logits(adapter.model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"]
    assert not any("experts" in name and "shared" not in name for name in config["target_modules"])
    torch.testing.assert_close(exports.in_peft(tmp_path, family), ours, rtol=1e-4, atol=1e-4)
    again = {"r_init": 7, "r_target": 7, "r_max": 7}
    options = {**OPTIONS, **options, "attention_alpha": 1.0}
    other = helpers.attach(models.build(family), config=again, **options)
    errors = other.import_peft(tmp_path)
    assert linears(other).keys() < errors.keys()
    assert max(e.max() for of in errors.values() for e in of.values()) == 0.0
    torch.testing.assert_close(logits(other.model), ours, rtol=1e-4, atol=1e-4)


def test_experts_that_are_linears_and_dense_linears_are_one_directory(tmp_path: Path) -> None:
    model = families.build("switch_transformers", torch.float32)
    adapter = helpers.attach(model, attention_rank=2, attention_targets=["q", "v"])
    helpers.uneven(adapter)
    fill(adapter)
    adapter.export_peft(tmp_path)
    with torch.no_grad():
        batch = families.batch("switch_transformers")
        ours = model.eval()(**batch).logits
        base = families.build("switch_transformers", torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()(**batch).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_names_that_transformers_renames_are_those_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("laguna").eval()
    adapter = fill(helpers.attach(model, attention_rank=2))
    adapter.export_peft(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(".shared_expert." in key for key in keys)  # "shared_experts" in the model
    ours = tiny.output(model, tiny.inputs("laguna"))
    theirs = peft.PeftModel.from_pretrained(tiny.build("laguna").eval(), tmp_path)
    found = tiny.output(theirs.base_model.model, tiny.inputs("laguna"))
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    again = {"r_init": 7, "r_target": 7, "r_max": 7}
    other = helpers.attach(tiny.build("laguna"), config=again, attention_rank=2)
    assert linears(other).keys() < other.import_peft(tmp_path).keys()
    monkeypatch.setattr(spelling, "_renaming", lambda model: lambda name: f"other.{name}")
    with pytest.raises(CheckpointError, match="PEFT would not find the LoRA of 16 Linears"):
        adapter.export_peft(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_one_lora_per_expert_takes_one_rank_and_scaling(tmp_path: Path) -> None:
    adapter = uneven("qwen2_moe")
    adapter.export_peft(tmp_path, per_expert=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (7, {}, {})
    assert config["target_modules"] == sorted({*exports_names(adapter)} | {"gate_proj", "up_proj"})
    held = load_file(tmp_path / "adapter_model.safetensors")
    for name, each in linears(adapter).items():
        lora_A, lora_B = (
            held[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB"
        )
        assert len(lora_A) == 7
        delta = config["lora_alpha"] / config["r"] * lora_B @ lora_A
        torch.testing.assert_close(delta.float(), each.lora.delta_weight(), rtol=1e-5, atol=1e-6)
    other = helpers.attach(
        models.build("qwen2_moe"), config={"r_init": 7, "r_max": 9, "r_target": 8}, **OPTIONS
    )
    other.import_peft(tmp_path)
    torch.testing.assert_close(logits(other.model), logits(adapter.model), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"rank=2 .* at least attention_rank=4"):
        adapter.export_peft(tmp_path, per_expert=True, rank=2)


def exports_names(adapter: drlora_torch.Adapter) -> set[str]:
    return {name.rpartition(".")[2] for name in linears(adapter)}


def test_a_lower_rank_takes_the_best_approximation(tmp_path: Path) -> None:
    adapter = uneven()
    adapter.export_peft(tmp_path)
    other = helpers.attach(models.build(), config={"r_init": 7, "r_target": 7}, attention_rank=3)
    errors = other.import_peft(tmp_path)
    for name, each in linears(adapter).items():
        exact = each.lora.delta_weight().double()
        have = linears(other)[name].lora.delta_weight().double()
        tail = torch.linalg.svdvals(exact)[3:].norm() / exact.norm()
        assert float((have - exact).norm() / exact.norm()) == pytest.approx(float(tail), abs=2e-6)
        assert errors[name]["weight"][0] == pytest.approx(float(tail), abs=2e-6)


def test_imports_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    uneven().export_peft(tmp_path)
    other = helpers.attach(models.build(), attention_rank=RANK, attention_targets=["q_proj"])
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(drlora_torch.CheckpointError, match=r"also adapts .*and attention_rank"):
        other.import_peft(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    other = helpers.attach(models.build(), attention_rank=RANK)
    before = [p.detach().clone() for p in other.parameters()]
    for damaged, message in (
        (None, "incomplete or ill-shaped LoRA"),
        (held[key][:-1], "has A .* and B"),
        (held[key] * float("nan"), "not finite"),
    ):
        changed = {**held, key: damaged} if damaged is not None else {**held}
        if damaged is None:
            del changed[key]
        exports.save_file(changed, file)
        with pytest.raises(drlora_torch.CheckpointError, match=message):
            other.import_peft(tmp_path)
    assert all(map(torch.equal, before, other.parameters()))


# -- beside PEFT -------------------------------------------------------------------------------


def in_peft_model(model: nn.Module) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_what_peft_adapts_is_left_to_it() -> None:
    wrapped = in_peft_model(models.build())
    for targets in (None, ["q_proj"], ["layers.0.self_attn.q_proj"]):
        with pytest.raises(drlora_torch.AttachError, match="leave it to one of the two"):
            helpers.attach(wrapped, attention_rank=RANK, attention_targets=targets)
    adapter = helpers.attach(wrapped, attention_rank=RANK, attention_targets=["v_proj"])
    assert len(linears(adapter)) == 2
    assert any(p.requires_grad for n, p in wrapped.named_parameters() if "lora_A.default" in n)


def test_peft_may_come_after(tmp_path: Path) -> None:
    model, adapter = adapted()
    ours = logits(model)
    wrapped = in_peft_model(model)
    assert not torch.equal(logits(model), ours)
    with wrapped.disable_adapter():
        assert torch.equal(logits(model), ours)
    adapter.save_pretrained(tmp_path)
    state = model.state_dict()
    model.load_state_dict(state)
    adapter.restore(tmp_path)
    helpers.step(model.train(), helpers.adamw(adapter))
    wrapped.unload()
    adapter.restore(tmp_path)
    assert torch.equal(logits(model), ours)


# -- Trainer, wrappers -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trainer_resumes_exactly(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "attach": OPTIONS}
    trainer, adapter = trainers.build(tmp_path / "a", **options)
    trainer.train()
    want = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    again, other = trainers.build(tmp_path / "b", **options)
    again.train(resume_from_checkpoint=True)
    have = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert have == want
    assert all(map(torch.equal, other.parameters(), adapter.parameters()))
    assert all(bool(each.lora.lora_B.any()) for each in linears(other).values())
    fresh = models.build()
    drlora_torch.load(fresh, tmp_path / "b")
    assert torch.equal(logits(fresh), logits(again.model))
