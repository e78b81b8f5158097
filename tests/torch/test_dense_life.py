"""LoRA of dense Linears in the life of an adapter, and in its files."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import drlora_torch
from drlora_torch import AttachError
from drlora_torch.attached import Attached
from drlora_torch.lifecycle import dense
from drlora_torch.lora.dense import DenseLoRA
from drlora_torch.merge import in_place
from drlora_torch.storage import adapter_file
from tests.torch import helpers, models
from tests.torch.dense import RANK, adapted, fill, linears, logits, train
from tests.torch.test_dense import against_a_slow_reference
from tests.torch.test_life import Picture

# -- life --------------------------------------------------------------------------------------


def detach_restores(family: str) -> None:
    model = models.build(family)
    picture, before = Picture(model), logits(model.eval())
    identity = {name: id(module) for name, module in model.named_modules()}
    model.train()
    adapter = helpers.attach(model, attention_rank=RANK, dropout=0.1)
    train(model, adapter, range(5))
    assert not torch.equal(logits(model), before)
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    adapter.detach()
    model.train()
    picture.assert_unchanged(model)
    assert {name: id(module) for name, module in model.named_modules()} == identity
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_disabled_and_detached_it_is_the_base_model(family: str) -> None:
    detach_restores(family)


def merge_is_exact(path: Path) -> None:
    model, adapter = adapted("qwen2_moe", dropout=0.1)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "drlora" not in n}
    ours, optimizer = logits(model), helpers.adamw(adapter)
    adapter.merge()
    merged = dict(model.named_parameters())
    assert merged.keys() == base.keys()
    changed = {n.removesuffix(".weight") for n in base if not torch.equal(base[n], merged[n])}
    assert linears(adapter).keys() < changed
    torch.testing.assert_close(logits(model), ours, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert all(torch.equal(base[n], model.get_parameter(n)) for n in base)
    assert torch.equal(logits(model), ours)
    helpers.step(model.train(), optimizer)


def test_merge_and_unmerge_are_exact(tmp_path: Path) -> None:
    merge_is_exact(tmp_path)


def test_a_changed_linear_cannot_be_unmerged() -> None:
    model, adapter = adapted()
    adapter.merge()
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1
    with pytest.raises(AttachError, match=r"the weight of '\S+q_proj' has changed since merge"):
        adapter.unmerge()


def test_plain_checkpoints_have_the_keys_of_the_base(tmp_path: Path) -> None:
    """``merge_and_save``, and ``save_pretrained`` of the adapted model."""
    plain = models.build("qwen2_moe")
    plain.save_pretrained(tmp_path / "plain")
    model, adapter = adapted("qwen2_moe")
    ours = logits(model)
    report = adapter.merge_and_save(tmp_path / "merged")
    assert torch.equal(logits(model), ours)
    assert report.logits_error is not None
    assert report.logits_error < 1e-5 < report.logits_effect
    model.save_pretrained(tmp_path / "base")
    keys, merged, base = (
        load_file(tmp_path / each / "model.safetensors") for each in ("plain", "merged", "base")
    )
    assert keys.keys() == merged.keys() == base.keys()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-4)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(found), logits(plain))
    drlora_torch.load(found, tmp_path / "base")
    assert torch.equal(logits(found), logits(model))


# -- files -------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    model, adapter = adapted("qwen2_moe")
    optimizer, losses = helpers.adamw(adapter), []
    for seed in range(7):
        if seed == 3:
            adapter.save_pretrained(tmp_path)
            state = copy.deepcopy(optimizer.state_dict())
        losses.append(helpers.step(model, optimizer, seed))
    fresh = models.build("qwen2_moe")
    loaded = drlora_torch.load(fresh, tmp_path)
    assert (loaded.options.attention_rank, loaded.options.attention_alpha) == (RANK, None)
    optimizer = helpers.adamw(loaded)
    optimizer.load_state_dict(state)
    assert [helpers.step(fresh, optimizer, seed) for seed in range(3, 7)] == losses[3:]
    assert helpers.rank_history(loaded) == helpers.rank_history(adapter)
    assert torch.equal(logits(fresh), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    adapter.restore(tmp_path / "again")
    loaded.restore(tmp_path)


def test_restore_and_pending_gradients(tmp_path: Path) -> None:
    model, adapter = adapted(attention_targets=["q_proj"])
    model(**helpers.batch()).loss.backward()
    adapter.save_pretrained(tmp_path)
    before = logits(model)
    fresh = models.build()
    loaded = drlora_torch.load(fresh, tmp_path)
    for have, want in zip(loaded.parameters(), adapter.parameters(), strict=True):
        assert torch.equal(have.grad, want.grad)
    train(fresh, loaded, range(2))
    assert not torch.equal(logits(fresh), before)
    loaded.restore(tmp_path)
    assert torch.equal(logits(fresh), before)
    used = drlora_torch.load(models.build(), tmp_path, trainable=False)
    assert not any(p.requires_grad for p in used.parameters())
    assert torch.equal(logits(used.model), before)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path / "a")
    model = models.build()
    for options in ({"attention_rank": 2}, {"attention_targets": ["q_proj"]}, {}):
        wanted = {} if not options else {"attention_rank": RANK, **options}
        other = fill(helpers.attach(model, **wanted))
        before = logits(model)
        with pytest.raises(drlora_torch.CheckpointError, match=r"other options or layers: .*atten"):
            other.restore(tmp_path / "a")
        assert torch.equal(logits(model), before)
        other.detach()
    del model.model.layers[1].self_attn.q_proj
    with pytest.raises(drlora_torch.CheckpointError, match=r"a Linear .*q_proj' that the"):
        drlora_torch.load(model, tmp_path / "a")


def test_files_from_before_load(tmp_path: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    helpers.fill(adapter)
    adapter.save_pretrained(tmp_path)
    tensors, description = adapter_file.read(tmp_path)
    del description["dense"]
    options = description["options"]
    description["options"] = {k: v for k, v in options.items() if "attention" not in k}
    assert len(description["options"]) == len(options) - 3
    adapter_file.write(tmp_path / "old", tensors, description)
    fresh = models.build()
    drlora_torch.load(fresh, tmp_path / "old")
    assert torch.equal(logits(fresh), logits(model))


def travels(assign: bool) -> None:
    model, adapter = adapted("qwen2_moe")
    train(model, adapter, range(5))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = models.build("qwen2_moe")
    other = helpers.attach(fresh, attention_rank=RANK)
    before = [id(p) for p in other.parameters()]
    assert fresh.load_state_dict(state, assign=assign).missing_keys == []
    assert [id(p) for p in other.parameters()] == before
    assert torch.equal(logits(fresh), logits(model))
    assert helpers.rank_history(other) == helpers.rank_history(adapter)
    lacking = {k: v for k, v in state.items() if "q_proj.drlora.lora_A" not in k}
    with pytest.raises(drlora_torch.CheckpointError, match=r"lacks tensor 'dense/\S+q_proj/lora_A"):
        fresh.load_state_dict(lacking)


@pytest.mark.parametrize("assign", [False, True])
def test_it_travels_in_the_state_dict(assign: bool) -> None:
    travels(assign)


def test_the_state_in_the_state_dict_has_room_for_the_names() -> None:
    model, adapter = adapted("deepseek_v3")
    key = next(key for key in model.state_dict() if key.endswith("_extra_state"))
    before = model.state_dict()[key].numel()
    train(model, adapter, range(7))
    assert model.state_dict()[key].numel() == before


def test_the_description_lists_them(tmp_path: Path) -> None:
    _, adapter = adapted(attention_targets=["q_proj"])
    adapter.save_pretrained(tmp_path)
    _, description = adapter_file.read(tmp_path)
    assert description["dense"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    description["dense"] = "q_proj"
    tensors, _ = adapter_file.read(tmp_path)
    adapter_file.write(tmp_path, tensors, json.loads(json.dumps(description)))
    with pytest.raises(drlora_torch.CheckpointError, match="list of names cannot be read"):
        drlora_torch.load(models.build(), tmp_path)


# -- the tests can fail ------------------------------------------------------------------------


def _unscaled(lora: DenseLoRA, inputs: Tensor) -> Tensor:
    return functional.linear(functional.linear(inputs, lora.lora_A), lora.lora_B)


def _always(attached: Attached, lora: DenseLoRA) -> Callable[..., Tensor]:
    return lambda linear, args, kwargs, output: output + lora(args[0])


def _left_in(attached: Attached) -> Callable[[], None]:
    _install(attached)
    return lambda: None


def _experts_alone(attached: Attached) -> Any:
    return _places(dataclasses.replace(attached, dense={}))


_install, _places = dense.install, in_place._places
BROKEN: dict[str, tuple[Any, str, Any, Callable[[Path], None]]] = {
    "no scaling": (DenseLoRA, "forward", _unscaled, lambda p: against_a_slow_reference("olmoe")),
    "in disabled()": (dense, "_adding", _always, lambda p: detach_restores("olmoe")),
    "hooks stay": (dense, "install", _left_in, lambda p: detach_restores("olmoe")),
    "not merged": (in_place, "_places", _experts_alone, merge_is_exact),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_variants_are_noticed(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    owner, name, value, check = BROKEN[case]
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(AssertionError):
        check(tmp_path)
