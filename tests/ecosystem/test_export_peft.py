"""PEFT loads what we export, in a process that never imports drlora, with our logits."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import drlora_torch
from drlora_core import AllocatorEngine
from tests.torch import helpers, models, reference
from tests.torch.conventions import families

FAMILIES = ["olmoe", "gpt_oss", "llama4", "switch_transformers"]
"""All others: test_export_conventions.py, in one process."""

LAST_DOWN = "base_model.model.model.layers.1.mlp.experts.lora_A.default.weight"

PEFT_ALONE = """
    import sys

    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        base = folder + "/base"
        both = AutoConfig.from_pretrained(base).is_encoder_decoder
        kind = AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
        model = kind.from_pretrained(base, experts_implementation="eager")
        model = PeftModel.from_pretrained(model, folder + "/peft").eval()
        missing = [n for n, p in model.named_parameters() if "lora_B" in n and not p.any()]
        assert not missing, missing
        with torch.no_grad():
            ids = load_file(folder + "/ids")["ids"]
            save_file({"logits": model(input_ids=ids, labels=ids).logits}, folder + "/logits")
    assert not [name for name in sys.modules if name.startswith("drlora")]
"""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=models.tokens(), labels=models.tokens()).logits


def uneven(family: str = "olmoe", seed: int = 0, **options: Any) -> drlora_torch.Adapter:
    """An adapter whose experts and layers differ in rank, with a trained-looking B."""
    adapter = helpers.attach(models.build(family), **options)
    layers = [layer.lora for layer in adapter.layers.values()]
    helpers.grow(layers[0], [3, 0, 0, 1, 0, 0, 5, 0])
    helpers.grow(layers[1], [0, 0, 2, 0, 1, 0, 0, 0])
    helpers.fill(adapter, seed)
    return adapter


def in_peft(directory: Path, family: str = "olmoe") -> torch.Tensor:
    """Logits of a fresh base model with an exported adapter, as PEFT loads it here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # patterns of parameters, see docs/ecosystem.md
        return logits(peft.PeftModel.from_pretrained(models.build(family), directory))


def write_for_peft(family: str, folder: Path) -> torch.Tensor:
    """Write a base model, an export and inputs; return the logits of the adapted model."""
    if family in models.FAMILIES:
        adapter = uneven(family, alpha=3.0)
    else:
        adapter = helpers.attach(families.build(family, torch.float32))
        helpers.uneven(adapter)
    assert adapter.export_peft(folder / "peft").largest_error == 0.0
    ours = logits(adapter.model)
    with adapter.disabled():
        assert (logits(adapter.model) - ours).abs().max() > 0.1
        adapter.model.save_pretrained(folder / "base")
    save_file({"ids": models.tokens()}, folder / "ids")
    return ours


@pytest.mark.slow
def test_peft_alone_gives_our_logits(tmp_path: Path) -> None:
    """One process for all families: most of its time is imports."""
    ours = {family: write_for_peft(family, tmp_path / family) for family in FAMILIES}
    script = tmp_path / "alone.py"
    script.write_text(textwrap.dedent(PEFT_ALONE))
    done = subprocess.run(
        [sys.executable, str(script), *(str(tmp_path / family) for family in FAMILIES)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for family, want in ours.items():
        have = load_file(tmp_path / family / "logits")["logits"]
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4, msg=family)


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("frozen", {"layout": "masked", "rslora": True}),
        ("frozen", {"targets": ["down_proj"]}),
        ("trainable", {}),
    ],
    ids=["masked", "one target", "router"],
)
def test_options_survive(tmp_path: Path, router: Any, options: Any) -> None:
    adapter = uneven(router=router, **options)
    for parameter in adapter.router_parameters().values():
        parameter.data.mul_(-1.0)
    adapter.export_peft(tmp_path)
    ours = logits(adapter.model)
    torch.testing.assert_close(in_peft(tmp_path), ours, rtol=1e-4, atol=1e-4)


def test_after_training_with_growth(tmp_path: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for seed in range(7):
        helpers.step(model, optimizer, seed)
    assert len(adapter.events) == 2
    adapter.export_peft(tmp_path)
    ours = logits(model)
    torch.testing.assert_close(in_peft(tmp_path), ours, rtol=1e-4, atol=1e-4)


def test_the_directory_is_standard(tmp_path: Path) -> None:
    report = uneven().export_peft(tmp_path)
    assert list(report.ranks.values()) == [7, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    second = "model.layers.1.mlp.experts"
    assert config["r"] == 7
    assert config["lora_alpha"] / config["r"] == 2.0
    assert config["rank_pattern"] == {f"{second}.gate_up_proj": 4, f"{second}.down_proj": 4}
    assert config["alpha_pattern"] == {f"{second}.gate_up_proj": 8, f"{second}.down_proj": 8}
    assert config["task_type"] == "CAUSAL_LM"
    read = peft.LoraConfig.from_pretrained(tmp_path)  # what we leave to its defaults
    assert (read.use_rslora, read.use_dora, read.fan_in_fan_out) == (False, False, False)
    assert (read.bias, read.lora_dropout) == ("none", 0.0)
    held = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
    assert held[key].shape == (models.EXPERTS * 4, models.HIDDEN)


# -- compression -------------------------------------------------------------------------------


@pytest.mark.parametrize("per", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_compression_is_the_best_and_its_error_is_told(
    tmp_path: Path, rank: int, per: bool
) -> None:
    adapter = uneven()
    report = adapter.export_peft(tmp_path / "a", rank=rank, per_expert=per)
    assert set(report.ranks.values()) == {rank}
    loaded = helpers.attach(models.build(), config={"r_init": 9, "r_target": 9, "r_max": 9})
    loaded.import_peft(tmp_path / "a")
    for name, projection, lora, _ in helpers.projections(adapter):
        for expert in range(models.EXPERTS):
            exact = lora.delta_weight(projection, expert).double()
            have = loaded.layers[name].lora.delta_weight(projection, expert).double()
            tail = torch.linalg.svdvals(exact)[rank:].norm() / exact.norm()
            error = float((have - exact).norm() / exact.norm())
            told = report.errors[name][projection][expert]
            assert error == pytest.approx(float(tail), abs=2e-6)
            assert told == pytest.approx(float(tail), abs=2e-6)
            assert (told == 0.0) == (int(lora.table.ranks()[expert]) <= rank)


def test_peft_loads_a_compressed_export(tmp_path: Path) -> None:
    adapter = uneven("gpt_oss")
    report = adapter.export_peft(tmp_path, rank=3)
    assert report.largest_error > 0.01
    other = helpers.attach(
        models.build("gpt_oss"), config={"r_init": 3, "r_target": 3, "r_max": 3}, alpha=6.0
    )
    assert max(e.max() for of in other.import_peft(tmp_path).values() for e in of.values()) == 0
    torch.testing.assert_close(
        in_peft(tmp_path, "gpt_oss"), logits(other.model), rtol=1e-4, atol=1e-4
    )


# -- import ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("per", [False, True])
def test_import_gives_the_same_function(tmp_path: Path, family: str, per: bool) -> None:
    adapter = uneven(family, router="trainable")
    adapter.export_peft(tmp_path, per_expert=per)
    config = {"r_init": 7, "r_target": 8, "r_max": 9}
    other = helpers.attach(
        models.build(family), config=config, alpha=5.0, layout="masked", router="trainable"
    )
    errors = other.import_peft(tmp_path)
    assert max(e.max() for of in errors.values() for e in of.values()) == 0.0
    ours = logits(adapter.model)
    torch.testing.assert_close(logits(other.model), ours, rtol=1e-4, atol=1e-4)
    for _, _, lora, slots in helpers.projections(other):
        rows = slots.lora_A[torch.from_numpy(lora.table.active())]
        assert (rows != 0).any(dim=1).all()  # dimensions that were empty can still learn


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_import_from_peft_itself(tmp_path: Path) -> None:
    """What PEFT trained and saved, attention left out, gives the same logits here."""
    model = models.build()
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=[],
        init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"layers.1.mlp.experts.down_proj": 3},
    )
    # PEFT 0.21 says so of every pattern for a parameter, and honours it all the same.
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
        wrapped = peft.get_peft_model(model, config)
    shapes = {name: list(p.shape) for name, p in wrapped.named_parameters() if "lora_A" in name}
    assert shapes[LAST_DOWN] == [models.EXPERTS * 3, models.INNER]
    wrapped.save_pretrained(tmp_path)
    theirs = logits(wrapped)
    other = helpers.attach(models.build(), config={"r_init": 3})
    other.import_peft(tmp_path)
    torch.testing.assert_close(logits(other.model), theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    uneven().export_peft(tmp_path)
    return tmp_path


def change(path: Path, **fields: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_import_at_ranks_of_a_profile(exported: Path) -> None:
    """Each expert takes what its own starting rank holds; at rank 0 that is nothing."""
    f = [0.0, 0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]
    plain = helpers.attach(models.build())
    profile = dict.fromkeys(plain.layers, (f, None))
    config = helpers.engine(r_init=0, r_target=6, r_max=16).config
    engine = AllocatorEngine.from_profile(config, profile, "profile")
    adapter = drlora_torch.attach(models.build(), engine)
    errors = adapter.import_peft(exported)
    source = uneven()
    for name, projection, lora, _ in helpers.projections(adapter):
        other = source.layers[name].lora
        assert lora.table.ranks()[0] == 0
        for expert in range(models.EXPERTS):
            want = reference.expert_delta(other, projection, expert)
            have = reference.expert_delta(lora, projection, expert)
            error = errors[name][projection][expert]
            lost = torch.linalg.norm(want - have) / torch.linalg.norm(want)
            assert float(lost) == pytest.approx(error, abs=1e-5)
            fits = lora.table.ranks()[expert] >= other.table.ranks()[expert]
            assert (error == 0.0) == fits


def test_import_at_rank_zero_is_refused(exported: Path) -> None:
    adapter = helpers.attach(models.build(), config={"r_init": 0})
    with pytest.raises(drlora_torch.CheckpointError, match=r"starts at rank 0.*use r_init >= 1"):
        adapter.import_peft(exported)


def test_import_is_a_starting_point(exported: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    helpers.step(model, helpers.adamw(adapter))
    with pytest.raises(drlora_torch.AttachError, match="starting point"):
        adapter.import_peft(exported)


def test_bad_ranks_and_full_disks(tmp_path: Path) -> None:
    adapter = uneven()
    for rank in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="rank must be"):
            adapter.export_peft(tmp_path, rank=rank)  # type: ignore[arg-type]
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(drlora_torch.CheckpointError, match="could not write"):
        adapter.export_peft(tmp_path / "taken")
    adapter.detach()
    with pytest.raises(drlora_torch.AttachError, match="detached"):
        adapter.export_peft(tmp_path)


@pytest.mark.parametrize("names", [["lm_head", "embed_tokens"], ["lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
def test_whole_modules_are_exported_and_imported(
    tmp_path: Path, names: list[str], tied: bool
) -> None:
    """Tied ones are trained together here; PEFT gets a copy of each."""
    model = models.build(tie_word_embeddings=tied)
    adapter = helpers.attach(model, modules_to_save=names)
    optimizer = helpers.adamw(adapter)
    for seed in range(5):
        helpers.step(model, optimizer, seed)
    adapter.export_peft(tmp_path)
    wanted = logits(model)
    with warnings.catch_warnings():  # PEFT asks Transformers by a deprecated name
        warnings.simplefilter("ignore", FutureWarning)
        base = models.build(tie_word_embeddings=tied)
        with_peft = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(with_peft), wanted, rtol=1e-4, atol=1e-5)
    fresh = models.build(tie_word_embeddings=tied)
    again = helpers.attach(fresh, modules_to_save=names)
    again.import_peft(tmp_path)
    for whole in ("lm_head", "model.embed_tokens"):
        trained, taken = (m.get_submodule(whole).weight for m in (model, fresh))
        assert torch.equal(trained, taken)
