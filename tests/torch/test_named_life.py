"""Several named adapters: taking out, merging, files, and what is refused."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import drlora_torch
from drlora_torch.integrations.trainer import DRLoRACallback
from tests.torch import helpers, models, named
from tests.torch.named import OF_EACH_KIND, life, outputs, same, several
from tests.torch.test_hooks import live_hooks
from tests.torch.test_life import Picture


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_detach_in_any_order_restores_the_model(order: tuple[str, ...]) -> None:
    model = named.build()
    model.lm_head.weight.requires_grad_(False)
    picture, base = Picture(model), outputs(model)
    adapters = {name: named.attach(model, name, router="trainable") for name in "abc"}
    for name, adapter in adapters.items():
        adapter.activate()
        helpers.step(model, helpers.adamw(adapter), ord(name))
    wanted = {}
    for name in "abc":
        adapters[name].activate()
        wanted[name] = outputs(model)
    for name in order:
        before = {n: a.is_active for n, a in adapters.items() if n != name}
        assert adapters.pop(name).detach() is model
        assert list(drlora_torch.adapters(model)) == list(adapters)
        if adapters and not any(before.values()):
            assert list(adapters.values())[-1].is_active
        for left, adapter in adapters.items():
            adapter.activate()
            assert torch.equal(outputs(model), wanted[left])
    picture.assert_unchanged(model)
    assert torch.equal(outputs(model), base)


def test_detach_inside_disabled_lets_the_next_one_be_active() -> None:
    model, adapters = several(names="ab", router="trainable")
    adapters["a"].activate()
    wanted = outputs(model)
    adapters["b"].activate()
    with adapters["b"].disabled():
        adapters["b"].detach()
    assert adapters["a"].is_active
    assert torch.equal(outputs(model), wanted)


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_merging_among_others(family: str, tmp_path: Path) -> None:
    model, adapters = several(family, names="ab", router="trainable")
    adapted = outputs(model)
    for name in "ab":
        with pytest.raises(drlora_torch.AttachError, match=r"under the other .*detach\(\) first"):
            adapters[name].merge()
    with pytest.raises(drlora_torch.AttachError, match=r"'a' is not active \('b' is\)"):
        adapters["a"].merge_and_save(tmp_path)
    assert torch.equal(outputs(model), adapted)
    adapters["b"].merge_and_save(tmp_path)
    assert torch.equal(outputs(model), adapted)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    adapters["a"].detach()
    adapters["b"].merge()
    torch.testing.assert_close(outputs(model), adapted, rtol=2e-5, atol=1e-5)
    assert same(again.state_dict(), model.state_dict())
    adapters["b"].unmerge()
    assert torch.equal(outputs(model), adapted)


def test_a_base_checkpoint_is_written_with_several(tmp_path: Path) -> None:
    base = named.build()
    model, adapters = several(names="abc")
    adapters["b"].detach()
    for active in "ac":
        adapters[active].activate()
        model.save_pretrained(tmp_path / active)
        again, report = type(model).from_pretrained(tmp_path / active, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
        assert same(again.state_dict(), base.state_dict())
    adapters["a"].detach()
    adapters["c"].detach()
    assert model.state_dict().keys() == base.state_dict().keys()


def test_resting_adapters_are_saved_exported_and_filled_as_active_ones(tmp_path: Path) -> None:
    _, adapters = several(names="ab", router="trainable")
    resting = adapters["a"]
    for name in ("resting", "active"):
        resting.save_pretrained(tmp_path / name)
        resting.export_peft(tmp_path / f"{name}-peft")
        resting.activate()
    for kind, file in (("", "drlora_adapter.safetensors"), ("-peft", "adapter_model.safetensors")):
        written = [load_file(tmp_path / f"{name}{kind}" / file) for name in ("resting", "active")]
        assert same(*written)
    fresh, twice = named.build(), named.build()
    for target in (fresh, twice):
        adapter = helpers.attach(target, config={"r_init": 4}, router="trainable", alpha=7.0)
        if target is twice:
            named.attach(twice, "b")
        assert adapter.is_active == (target is fresh)
        adapter.import_peft(tmp_path / "resting-peft")
        adapter.activate()
    assert torch.equal(outputs(fresh), outputs(twice))


def test_a_resting_adapter_is_restored_in_the_middle_of_a_step(tmp_path: Path) -> None:
    model, adapters = several(names="ab", router="trainable")
    for name in "ba":
        adapters[name].activate()
        helpers.step(model, helpers.adamw(adapters[name]), ord(name))
    model(**helpers.batch()).loss.backward()
    adapters["a"].save_pretrained(tmp_path)
    wanted = [p.grad.clone() for p in adapters["a"].parameters()]
    saved, shown = life(adapters["a"]), outputs(model)
    helpers.step(model, helpers.adamw(adapters["a"]), 5)
    adapters["b"].activate()
    before, others = outputs(model), life(adapters["b"])
    adapters["a"].restore(tmp_path)
    assert torch.equal(outputs(model), before)
    assert same(life(adapters["b"]), others)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same(life(adapters["a"]), saved)
    adapters["a"].activate()
    assert torch.equal(outputs(model), shown)
    assert same([p.grad for p in adapters["a"].parameters()], wanted)


def test_loaded_for_use_only_they_stay_so(tmp_path: Path) -> None:
    trained, adapters = several(names="ab", router="trainable")
    for name, adapter in adapters.items():
        adapter.activate()
        helpers.step(trained, helpers.adamw(adapter), ord(name))
        adapter.save_pretrained(tmp_path / name)
    model = named.build()
    for name in "ab":
        drlora_torch.load(model, tmp_path / name, adapter_name=name, trainable=False)
    for name in "abab":
        adapters[name].activate()
        adapter = drlora_torch.set_adapter(model, name)
        assert adapter.is_active
        assert adapter.name == name
        assert torch.equal(outputs(model), outputs(trained))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model(**helpers.batch())  # in training mode; nothing is counted and nothing warned of
    assert [a.engine.step_count for a in drlora_torch.adapters(model).values()] == [1, 1]


def test_what_a_resting_adapter_refuses() -> None:
    _, adapters = several(names="ab")
    by_hand = several(names="ab", auto_step=False)[1]["a"]
    for use in (by_hand.step, adapters["a"].disabled().__enter__):
        with pytest.raises(drlora_torch.AttachError, match=r"'a' is not active \('b' is\); call"):
            use()
    with pytest.raises(drlora_torch.AttachError, match="'a' is not active"):
        DRLoRACallback(adapters["a"]).on_train_begin(None, None, None)  # type: ignore[arg-type]
    with adapters["b"].disabled():
        with pytest.raises(drlora_torch.AttachError, match=r"inside disabled\(\) of 'b'"):
            adapters["a"].activate()
        assert adapters["b"].is_active
    adapters["a"].detach()
    with pytest.raises(drlora_torch.AttachError, match="was detached or merged"):
        adapters["a"].activate()
    assert not adapters["a"].is_active


BAD_NAMES: list[tuple[Any, str]] = [
    ("a", r"has an adapter already; call its detach.*than 'a' \(taken: 'a', 'b'\)"),
    ("", "letters, digits"),
    ("law.v2", r"letters, digits.*got 'law\.v2'"),
    ("my law", "letters, digits"),
    (None, "letters, digits.*got None"),
]


@pytest.mark.parametrize(("name", "message"), BAD_NAMES, ids=str)
def test_bad_names_change_nothing(name: Any, message: str, tmp_path: Path) -> None:
    model, adapters = several(names="ab")
    adapters["a"].save_pretrained(tmp_path)
    picture, engine = Picture(model), helpers.engine()
    with pytest.raises(drlora_torch.AttachError, match=message):
        drlora_torch.attach(model, engine, adapter_name=name)
    with pytest.raises(drlora_torch.AttachError, match=message):
        drlora_torch.load(model, tmp_path, adapter_name=name)
    picture.assert_unchanged(model)
    assert engine.layer_names == ()


def test_unknown_names_engines_in_use_and_other_roots() -> None:
    model, adapters = several(names="ab")
    attached = helpers.attach(model, adapter_name="legal")
    with pytest.raises(
        drlora_torch.AttachError, match=r"no adapter 'legall'; did you mean 'legal'"
    ):
        drlora_torch.set_adapter(model, "legall")
    with pytest.raises(drlora_torch.AttachError, match=r"no adapter 3; known: 'a', 'b', 'legal'"):
        drlora_torch.set_adapter(model, 3)  # type: ignore[arg-type]
    with pytest.raises(drlora_torch.AttachError, match="decides the ranks of adapter 'b'"):
        drlora_torch.attach(model, adapters["b"].engine, adapter_name="d")
    for part in (model.model, nn.ModuleDict({"whole": model})):
        with pytest.raises(drlora_torch.AttachError, match="a part of it or to a model around it"):
            helpers.attach(part, adapter_name="d")
    with attached.disabled(), pytest.raises(drlora_torch.AttachError, match="inside disabled"):
        helpers.attach(model, adapter_name="d")
    with pytest.raises(drlora_torch.ModelError, match=r"must be a torch\.nn\.Module, got list"):
        drlora_torch.adapters([])  # type: ignore[arg-type]
    assert drlora_torch.adapters(named.build()) == {}
    assert attached.is_active


def test_a_failed_attach_leaves_the_active_one_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from drlora_torch.models.fused import Fused

    model, adapters = several(names="ab", router="trainable")
    picture, before = Picture(model), outputs(model)
    install, calls = Fused.install, []

    def fail_second(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("no more")
        return install(*args)

    monkeypatch.setattr(Fused, "install", fail_second)
    with pytest.raises(MemoryError, match="no more"):
        helpers.attach(model, adapter_name="c")
    assert list(drlora_torch.adapters(model)) == ["a", "b"]
    assert adapters["b"].is_active
    assert torch.equal(outputs(model), before)
    now = Picture(model)
    assert (now.names, now.required, now.ignored) == (
        picture.names,
        picture.required,
        picture.ignored,
    )
    helpers.step(model, helpers.adamw(adapters["b"]))
    assert adapters["b"].engine.step_count == 1


def test_resting_adapters_move_with_the_model_and_are_not_copied() -> None:
    model, adapters = several(names="ab")
    model.double()
    assert {p.dtype for a in adapters.values() for p in a.parameters()} == {torch.float64}
    for what in (model, adapters["a"]):
        with pytest.raises(drlora_torch.AttachError, match="neither copied nor pickled"):
            copy.deepcopy(what)


def test_a_dropped_model_leaves_no_hook() -> None:
    gc.collect()
    helpers.attach(models.build()).detach()
    before = live_hooks()
    model, adapters = several(router="trainable")
    gone = weakref.ref(model)
    del model, adapters
    gc.collect()
    assert gone() is None
    helpers.attach(models.build()).detach()  # the next adapter sweeps
    assert live_hooks() == before
