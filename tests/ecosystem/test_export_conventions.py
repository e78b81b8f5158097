"""Exports of every convention: PEFT computes what we compute, and we read it back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import drlora_torch
from tests.ecosystem.in_peft import CASES, CONVENTIONS, Case
from tests.marks import one_in, slow_and_thinned
from tests.torch import dense, helpers
from tests.torch.conformance.table import FAMILIES
from tests.torch.conventions import handwritten

LOST = "mistral_large4"
"""PEFT 0.21 renames its keys on loading and finds none of them; see the last test."""
IN_PEFT = [name for name in CASES if name not in ("dbrx", LOST)]
LINEARS = ["switch_transformers", "nllb_moe", "Block", "DictBlock"]
ROOM = {"r_init": 8, "r_target": 8, "r_max": 8}


@pytest.fixture(autouse=True)
def registered() -> None:
    handwritten.register()


def skip_unknown(name: str) -> None:
    """Skip the test if the installed Transformers has no such family."""
    if name in FAMILIES and not FAMILIES[name].is_known(name):
        pytest.skip(f"this version of Transformers has no {name}")


def deltas(adapter: drlora_torch.Adapter) -> dict[tuple[str, str, int], torch.Tensor]:
    """s B A of every expert."""
    return {
        (name, projection, expert): lora.delta_weight(projection, expert)
        for name, projection, lora, _ in helpers.projections(adapter)
        for expert in range(lora.table.num_experts)
    }


def assert_same_deltas(have: drlora_torch.Adapter, want: drlora_torch.Adapter) -> None:
    wanted = deltas(want)
    for place, delta in deltas(have).items():
        torch.testing.assert_close(delta, wanted[place], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *one_in(2, ((name, None) for name in IN_PEFT)),
        *slow_and_thinned((name, 2) for name in IN_PEFT if name in FAMILIES),
    ],
)
def test_peft_computes_what_we_do(tmp_path: Path, name: str, rank: int | None) -> None:
    """With ``attention_rank`` too; for other conventions, see tests/ecosystem/test_dense.py."""
    skip_unknown(name)
    case = CASES[name]
    with case.context():
        adapter = case.uneven(alpha=3.0, attention_rank=rank)
        if rank is not None:
            dense.fill(adapter)
        adapter.export_peft(tmp_path)
        ours = case.outputs(adapter.model)
        with adapter.disabled():
            assert case.distance(case.outputs(adapter.model), ours) > 0.02
        assert case.distance(case.in_peft(tmp_path), ours) < case.rounding


@pytest.mark.parametrize(
    ("name", "per_expert"),
    one_in(
        2,
        ((name, e) for name in CONVENTIONS for e in (True, False) if e or name in IN_PEFT),
    ),
)
def test_import_gives_it_back(tmp_path: Path, name: str, per_expert: bool) -> None:
    case = CASES[name]
    adapter = case.uneven()
    report = adapter.export_peft(tmp_path, per_expert=per_expert)
    assert report.largest_error == 0.0
    other = case.attach(config=ROOM, alpha=5.0, layout="masked")
    errors = other.import_peft(tmp_path)
    assert max(e.max() for of in errors.values() for e in of.values()) == 0.0
    assert_same_deltas(other, adapter)


@pytest.mark.parametrize("name", ["llama4", "jetmoe", "longcat_flash", "switch_transformers"])
def test_compressed(tmp_path: Path, name: str) -> None:
    """PEFT loads the best approximations, whose errors are told."""
    case = CASES[name]
    adapter = case.uneven()
    report = adapter.export_peft(tmp_path, rank=3)
    assert set(report.ranks.values()) == {3}
    assert report.largest_error > 0.01
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {}
    other = case.attach(config={"r_init": 3, "r_target": 3, "r_max": 3})
    other.import_peft(tmp_path)
    for place, have in deltas(other).items():
        layer, projection, expert = place
        want = deltas(adapter)[place] if not expert else have
        error = float((have - want).norm() / want.norm())
        told = report.errors[layer][projection][expert] if not expert else 0.0
        assert error == pytest.approx(told, abs=1e-9)
    assert case.distance(case.in_peft(tmp_path), case.outputs(other.model)) < case.rounding


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["llama4", "jetmoe", "longcat_flash", "nllb_moe"])
def test_one_target_only(tmp_path: Path, name: str, which: int) -> None:
    case = CASES[name]
    target = list(next(iter(case.attach().layers.values())).record.projections)[which]
    adapter = case.uneven(targets=[target])
    adapter.export_peft(tmp_path)
    ours = case.outputs(adapter.model)
    assert case.distance(case.in_peft(tmp_path), ours) < case.rounding


@pytest.mark.parametrize("name", ["llama4", "jetmoe", "switch_transformers"])
def test_routers_that_learned(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    adapter = case.uneven(router="trainable")
    for parameter in adapter.router_parameters().values():
        parameter.data.mul_(-1.0)
    adapter.export_peft(tmp_path)
    ours = case.outputs(adapter.model)
    assert case.distance(case.in_peft(tmp_path), ours) < case.rounding
    other = case.attach(config=ROOM, router="trainable")
    other.import_peft(tmp_path)
    assert case.distance(case.outputs(other.model), ours) < case.rounding


# -- Linears keep their ranks ------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEARS)
def test_every_linear_has_the_rank_of_its_expert(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    adapter = case.uneven(config={"r_init": 1, "r_target": 3, "r_max": 7})
    adapter.export_peft(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    ranks = sorted(len(value) for key, value in held.items() if "lora_A" in key)
    projections = len(next(iter(adapter.layers.values())).record.projections)
    own = [rank for of in adapter.ranks().values() for rank in of.tolist()]
    assert ranks == sorted(own * projections)
    assert len(set(own)) > 3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted([config["r"], *config["rank_pattern"].values()]) == sorted(set(own))
    assert config["target_parameters"] is None
    assert case.distance(case.in_peft(tmp_path), case.outputs(adapter.model)) < case.rounding


def test_other_linears_of_these_names_are_left_alone(tmp_path: Path) -> None:
    """Switch Transformers has dense layers with Linears of the same names."""
    case = CASES["switch_transformers"]
    case.uneven().export_peft(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(case.build(), tmp_path)
    adapted = {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert adapted
    assert all(".experts.expert_" in name for name in adapted)


def test_an_expert_without_rank_gets_one_of_zeros(tmp_path: Path) -> None:
    case = CASES["Block"]
    adapter = case.uneven()
    lora = next(iter(adapter.layers.values())).lora
    cut = np.zeros((8, 8), dtype=np.bool_)
    cut[2] = True
    lora.clear(lora.table.cut(cut))
    assert lora.table.ranks()[2] == 0
    adapter.export_peft(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert not held["base_model.model.blocks.0.experts.2.w1.lora_B.weight"].any()
    assert case.distance(case.in_peft(tmp_path), case.outputs(adapter.model)) < case.rounding


@pytest.mark.parametrize("shared", [True, False])
def test_experts_without_a_name_of_their_own(tmp_path: Path, shared: bool) -> None:
    class Odd(handwritten.Block):
        def listed(self) -> list[nn.Module]:
            first = self.experts[0]
            return [first] * 8 if shared else [_Outside(e) for e in self.experts]

    drlora_torch.register_moe(
        Odd,
        experts=Odd.listed,
        projections=handwritten.PROJECTIONS,
        router="gate",
        routing=handwritten.by_gate,
    )
    adapter = helpers.attach(handwritten.Model(Odd))
    for per_expert in (False, True):
        with pytest.raises(drlora_torch.ModelError, match="not modules of the block"):
            adapter.export_peft(tmp_path / "x", per_expert=per_expert)
    assert not (tmp_path / "x").exists()


class _Outside(nn.Module):
    """A view of an expert that is no child of the block."""

    def __init__(self, expert: Any) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = expert.w1, expert.w2, expert.w3


# -- from PEFT itself --------------------------------------------------------------------------


def trained_in_peft(case: Case, config: peft.LoraConfig, path: Path) -> torch.Tensor:
    """What PEFT computes of a LoRA that it drew, and saved."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(case.build(), config).eval()
        wrapped.save_pretrained(path)
    return case.outputs(wrapped)


def test_import_of_linears_from_peft_itself(tmp_path: Path) -> None:
    case = CASES["switch_transformers"]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        use_rslora=True,
        target_modules=r".*experts\.expert_\d+\.(wi|wo)",
        rank_pattern={r"expert_3\.wi": 4},
        alpha_pattern={"wo": 3},
        init_lora_weights=False,
    )
    theirs = trained_in_peft(case, config, tmp_path)
    adapter = case.attach(config=ROOM)
    adapter.import_peft(tmp_path)
    assert case.distance(case.outputs(adapter.model), theirs) < 1e-6  # PEFT draws in float32


def test_import_of_parameters_from_peft_itself(tmp_path: Path) -> None:
    case = CASES["llama4"]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    theirs = trained_in_peft(case, config, tmp_path)
    adapter = case.attach(config=ROOM)
    adapter.import_peft(tmp_path)
    assert case.distance(case.outputs(adapter.model), theirs) < 1e-6


# -- what PEFT cannot do -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_dbrx_is_refused_for_a_reason_that_holds(tmp_path: Path) -> None:
    case = CASES["dbrx"]
    adapter = case.uneven()
    with pytest.raises(drlora_torch.CheckpointError, match="PEFT cannot adapt w1 of layer"):
        adapter.export_peft(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    parameters = ["mlp.w1", "mlp.v1", "mlp.w2"]
    config = peft.LoraConfig(target_modules=[], target_parameters=parameters)
    with pytest.raises(AttributeError, match="no attribute 'v1'"):
        case.outputs(peft.get_peft_model(case.build(), config))
    adapter.export_peft(tmp_path / "y", per_expert=True)
    file = tmp_path / "y" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_parameters": parameters}))
    with pytest.raises(drlora_torch.CheckpointError, match="PEFT cannot adapt w1 of layer"):
        case.attach(config=ROOM).import_peft(tmp_path / "y")


def test_a_parameter_of_the_model_itself_is_refused(tmp_path: Path) -> None:
    from tests.torch import models

    experts = models.HandRouted().experts
    adapter = helpers.attach(experts)
    with pytest.raises(drlora_torch.CheckpointError, match="of the model itself"):
        adapter.export_peft(tmp_path)
    adapter.export_peft(tmp_path, per_expert=True)
    assert "base_model.model.3.up_proj.lora_A.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )


@pytest.mark.filterwarnings("ignore")
def test_peft_loses_its_own_adapters_of_mistral_large4(tmp_path: Path) -> None:
    """If this fails, PEFT or Transformers has fixed it: delete ``LOST``."""
    skip_unknown(LOST)
    case = CASES[LOST]
    config = peft.LoraConfig(
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    with case.context():
        theirs = trained_in_peft(case, config, tmp_path)
        assert case.distance(case.in_peft(tmp_path), theirs) > 0.1
