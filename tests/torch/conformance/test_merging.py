"""merge, unmerge and merge_and_save, over the table; and the states of an adapter."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drlora_torch
from tests.torch import helpers, models, reference
from tests.torch.conformance import tiny
from tests.torch.conformance.test_table import ROUNDING, distance, table, thinned
from tests.torch.test_life import Picture


def adapted(name: str) -> tuple[Any, drlora_torch.Adapter]:
    model = tiny.build(name).eval()
    adapter = helpers.attach(model)
    helpers.uneven(adapter, scale=0.5)
    return model, adapter


def outputs(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return tiny.output(model, tiny.inputs(name))


@table
def test_merged_outputs_are_the_adapted_ones(name: str) -> None:
    model = tiny.build(name, exact=True).eval()
    picture = Picture(model)
    with tiny.Float64Throughout():
        adapter = helpers.attach(model)
        helpers.uneven(adapter, scale=0.5)
        before = outputs(model, name)
        assert adapter.merge() is model
        assert distance(outputs(model, name), before) < ROUNDING
    now = Picture(model)
    for field in ("names", "identity", "required", "attributes", "configs", "hooks", "modules"):
        assert getattr(now, field) == getattr(picture, field), field


@thinned
def test_unmerge_brings_back_every_bit(name: str) -> None:
    model = tiny.build(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for seed in range(5):
        tiny.step(model, name, optimizer, seed)
    ranks = helpers.rank_history(adapter)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = outputs(model.eval(), name)
    adapter.merge()
    changed = [key for key, value in model.state_dict().items() if key in weights]
    assert any(not torch.equal(model.state_dict()[key], weights[key]) for key in changed)
    assert adapter.unmerge() is model
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(helpers.equal(after[key], value) for key, value in state.items())
    assert torch.equal(outputs(model, name), before)
    assert helpers.rank_history(adapter) == ranks
    adapter.detach()
    after = model.state_dict()
    assert all(helpers.equal(after[key], value) for key, value in weights.items())


@thinned
def test_merge_and_save_writes_a_plain_checkpoint(name: str, tmp_path: Path) -> None:
    model, adapter = adapted(name)
    before, state = outputs(model, name), {k: v.clone() for k, v in model.state_dict().items()}
    identity = [id(parameter) for parameter in adapter.parameters()]
    adapter.merge_and_save(tmp_path)
    assert [id(parameter) for parameter in adapter.parameters()] == identity
    assert all(helpers.equal(model.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(outputs(model, name), before)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    adapter.merge()
    merged = model.state_dict()
    assert all(helpers.equal(value, merged[key]) for key, value in again.state_dict().items())
    assert again.state_dict().keys() == merged.keys()


LOADER = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("drlora_core", "drlora_torch"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Refuse())
import torch, transformers
torch.set_num_threads(1)
for folder, model_class in json.loads(sys.argv[1]).items():
    model = getattr(transformers, model_class).from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.load(folder + "/ids.pt")).logits
    torch.save(logits, folder + "/logits.pt")
assert not any(name.startswith("drlora") for name in sys.modules)
"""


@pytest.mark.slow
def test_others_load_a_merged_checkpoint_without_drlora(tmp_path: Path) -> None:
    wanted, folders = {}, {}
    for family in ("olmoe", "gpt_oss", "nemotron_h", "deepseek_v3"):
        model = models.build(family).eval()
        adapter = helpers.attach(model)
        helpers.uneven(adapter)
        folder = tmp_path / family
        adapter.merge_and_save(folder)
        torch.save(models.tokens(), folder / "ids.pt")
        folders[str(folder)] = type(model).__name__
        with torch.no_grad():
            wanted[folder] = model(models.tokens()).logits
    subprocess.run([sys.executable, "-W", "ignore", "-c", LOADER, json.dumps(folders)], check=True)
    for folder, logits in wanted.items():
        assert distance(torch.load(folder / "logits.pt"), logits) < 2e-6  # float32, other sums


def test_training_goes_on_after_unmerge_as_if_nothing_had_happened() -> None:
    runs = []
    for merges in (False, True):
        model = models.build()
        adapter = helpers.attach(model, router="after_warmup", dropout=0.1)
        optimizer = helpers.adamw(adapter)
        torch.manual_seed(0)
        losses = []
        for seed in range(8):
            losses.append(helpers.step(model, optimizer, seed))
            if merges and seed in (2, 4, 5):
                adapter.merge()
                adapter.unmerge()
        runs.append((losses, helpers.rank_history(adapter), adapter.engine.step_count))
        assert len(adapter.events) == 2
    assert runs[0] == runs[1]


def test_what_a_merged_adapter_refuses(tmp_path: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    helpers.step(model, optimizer)
    ranks = helpers.rank_history(adapter)
    with pytest.raises(drlora_torch.AttachError, match="is not merged"):
        adapter.unmerge()
    adapter.merge()
    merged = "is merged into the weights of the model; call adapter.unmerge"
    for use in (adapter.merge, adapter.detach, adapter.parameters, adapter.step):
        with pytest.raises(drlora_torch.AttachError, match=merged):
            use()
    for save in (adapter.save_pretrained, adapter.merge_and_save, adapter.export_peft):
        with pytest.raises(drlora_torch.AttachError, match=merged):
            save(tmp_path)
    for context in (adapter.disabled, adapter.paused):
        with pytest.raises(drlora_torch.AttachError, match=merged), context():
            pass
    with pytest.raises(drlora_torch.AttachError, match=r"would train nothing; call .*unmerge"):
        helpers.step(model, optimizer)
    assert helpers.rank_history(adapter) == ranks
    assert not list(tmp_path.iterdir())
    optimizer.zero_grad()
    adapter.unmerge()
    helpers.step(model, optimizer)
    assert adapter.engine.step_count == 2


def test_without_originals_the_adapter_ends() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    helpers.uneven(adapter)
    adapter.merge(keep_originals=False)
    with pytest.raises(drlora_torch.AttachError, match="kept no copies"):
        adapter.unmerge()
    with pytest.raises(drlora_torch.AttachError, match="was detached or merged"):
        adapter.parameters()


def test_a_merged_model_that_changed_is_not_overwritten() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    helpers.uneven(adapter)
    adapter.merge()
    merged = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] += 1e-3
    with pytest.raises(drlora_torch.AttachError, match=r"expert 3 of layer 'model\.layers\.1\.mlp"):
        adapter.unmerge()
    model.load_state_dict(merged)
    other = helpers.attach(model)
    with pytest.raises(drlora_torch.AttachError, match="another adapter was attached"):
        adapter.unmerge()
    other.detach()
    model.to(torch.bfloat16)
    with pytest.raises(drlora_torch.AttachError, match="trained or converted"):
        adapter.unmerge()
    model.to(torch.float32).load_state_dict(merged)
    adapter.unmerge()
    assert adapter.parameters()


def test_trained_values_stay_through_merge_and_unmerge() -> None:
    model = models.build()
    base = copy.deepcopy(model).eval()
    adapter = helpers.attach(model, router="trainable")
    optimizer = helpers.adamw(adapter)
    for seed in range(3):
        helpers.step(model, optimizer, seed)
    trained = {n: p.detach().clone() for n, p in adapter.router_parameters().items()}
    model.eval()
    with adapter.disabled():
        adapter.merge()
        with pytest.raises(drlora_torch.AttachError, match=r"inside adapter\.disabled"):
            adapter.unmerge()
    assert all(torch.equal(model.get_parameter(n), value) for n, value in trained.items())
    adapter.unmerge()
    assert all(torch.equal(model.get_parameter(n), value) for n, value in trained.items())
    with torch.no_grad(), adapter.disabled():
        assert torch.equal(model(models.tokens()).logits, base(models.tokens()).logits)
        with pytest.raises(drlora_torch.AttachError, match=r"inside adapter\.disabled"):
            adapter.merge_and_save("anywhere")


def test_narrow_lora_does_not_narrow_the_weights() -> None:
    """LoRA in bfloat16 over float32 weights: only the update is as coarse as the LoRA."""
    model = models.build()
    base = copy.deepcopy(model)
    adapter = helpers.attach(model, dtype="bfloat16")
    helpers.uneven(adapter, scale=0.01)
    name = "model.layers.0.mlp.experts"
    delta = reference.expert_delta(adapter.layers[name].lora, "down_proj", 3).float()
    adapter.merge()
    weights = [one.get_submodule(name).down_proj[3].detach() for one in (model, base)]
    change = weights[0] - weights[1]
    assert float((change - delta).abs().max()) <= 2.0**-6 * float(delta.abs().max())


def test_experts_without_rank_keep_their_bits() -> None:
    """Minus zeros included, which W + 0 would lose."""
    model = models.build()
    name = "model.layers.0.mlp.experts"
    with torch.no_grad():
        model.get_submodule(name).down_proj[2, 0, 0] = -0.0
    adapter = helpers.attach(
        model, config={"policy": "prune", "r_init": 4, "r_target": 1, "r_max": 4, "growth_end": 4}
    )
    lora = adapter.layers[name].lora
    cut = np.zeros((8, 4), dtype=bool)
    cut[2] = True
    lora.clear(lora.table.cut(cut))
    adapter.merge()
    assert bool(torch.signbit(model.get_submodule(name).down_proj[2, 0, 0]))


def test_a_merged_checkpoint_replaces_an_older_one_of_several_files(tmp_path: Path) -> None:
    model, adapter = adapted("olmoe")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    adapter.merge_and_save(tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_models_that_are_none_of_transformers() -> None:
    model = models.HandRouted()
    adapter = helpers.attach(model)
    with pytest.raises(drlora_torch.ModelError, match="has no save_pretrained"):
        adapter.merge_and_save("anywhere")


def test_a_merged_model_is_not_kept_alive() -> None:
    model = models.build()
    adapter = helpers.attach(model)
    adapter.merge()
    watched = weakref.ref(model)
    del model, adapter
    gc.collect()
    assert watched() is None
