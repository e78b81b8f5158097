"""Saving and loading: round trips, resuming, and damage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import drlora_torch
from drlora_torch.adapter import state_of
from drlora_torch.storage import adapter_file
from tests.marks import one_in, slow_but
from tests.torch import helpers, models
from tests.torch.test_life import Picture

FILE = adapter_file.FILE_NAME


def trained(steps: int = 5, config: dict[str, Any] | None = None, **options: Any) -> Any:
    """Train a fresh OLMoE; its adapter."""
    model = models.build()
    adapter = helpers.attach(model, config=config, **options)
    optimizer = helpers.adamw(adapter)
    for seed in range(steps):
        helpers.step(model, optimizer, seed)
    return adapter


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(models.tokens()).logits


@pytest.mark.parametrize("layout", ["pooled", "masked"])
@pytest.mark.parametrize("config", [{}, {"policy": "prune", "r_init": 6}, {"scope": "global"}])
def test_round_trip(tmp_path: Path, layout: str, config: dict[str, Any]) -> None:
    adapter = trained(config=config, layout=layout, alpha=5.0, targets=["down_proj"], rslora=True)
    adapter.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [FILE]
    model = models.build()
    loaded = drlora_torch.load(model, tmp_path)
    assert torch.equal(logits(model), logits(adapter.model))
    assert loaded.options == adapter.options.model_copy(update={"layers": tuple(adapter.layers)})
    assert helpers.rank_history(loaded) == helpers.rank_history(adapter)
    assert loaded.engine.config == adapter.engine.config
    assert loaded.engine.step_count == 5
    for name in adapter.layers:
        for read in ("saliency", "routing_frequency", "rank_importance"):
            have, want = getattr(loaded.engine, read)(name), getattr(adapter.engine, read)(name)
            assert np.array_equal(have, want)
    pairs = zip(loaded.parameters(), adapter.parameters(), strict=True)
    assert all(helpers.equal(a.detach(), b.detach()) for a, b in pairs)


def test_path_may_be_the_file_and_save_replaces(tmp_path: Path) -> None:
    adapter = trained(1)
    adapter.save_pretrained(str(tmp_path / "deep" / "er"))
    first = (tmp_path / "deep" / "er" / FILE).read_bytes()
    helpers.fill(adapter)
    adapter.save_pretrained(tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "er" / FILE).read_bytes() != first
    model = models.build()
    drlora_torch.load(model, tmp_path / "deep" / "er" / FILE)
    assert torch.equal(logits(model), logits(adapter.model))


@pytest.mark.parametrize("stop", slow_but(range(1, 10), [2, 9]))
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("pooled", {"router": "after_warmup"}),
        ("masked", {"config": {"policy": "prune", "r_init": 6}}),
    ],
    ids=["growth", "prune"],
)
def test_resume_at_any_step(tmp_path: Path, stop: int, layout: str, options: Any) -> None:
    """The same losses and ranks as without the stop, bit for bit, newborn rows included."""
    straight = models.build()
    adapter = helpers.attach(straight, layout=layout, **options)
    optimizer = helpers.adamw(adapter, weight_decay=0.1)
    losses = [helpers.step(straight, optimizer, seed) for seed in range(10)]

    first = models.build()
    before = helpers.attach(first, layout=layout, **options)
    first_optimizer = helpers.adamw(before, weight_decay=0.1)
    resumed = [helpers.step(first, first_optimizer, seed) for seed in range(stop)]
    before.save_pretrained(tmp_path)
    torch.save(first_optimizer.state_dict(), tmp_path / "optimizer.pt")

    second = models.build()
    after = drlora_torch.load(second, tmp_path)
    second_optimizer = helpers.adamw(after, weight_decay=0.1)
    second_optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    resumed += [helpers.step(second, second_optimizer, seed) for seed in range(stop, 10)]
    assert resumed == losses
    assert helpers.rank_history(after) == helpers.rank_history(adapter)
    pairs = zip(after.parameters(), adapter.parameters(), strict=True)
    assert all(helpers.equal(a.detach(), b.detach()) for a, b in pairs)
    assert [a.tolist() for a in state_of(after).ages.values()] == [
        a.tolist() for a in state_of(adapter).ages.values()
    ]


def test_restore_in_place(tmp_path: Path) -> None:
    """Go back to a saved state under the same parameters, to before the end of the warmup too."""
    model = models.build()
    adapter = helpers.attach(model, router="after_warmup")
    parameters = adapter.parameters()
    optimizer = helpers.adamw(adapter)
    helpers.step(model, optimizer)
    adapter.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    losses = [helpers.step(model, optimizer, seed) for seed in range(1, 7)]
    ranks = helpers.rank_history(adapter)
    model(**helpers.batch(9)).loss.backward()  # a step that was begun and is given up
    optimizer.zero_grad()
    adapter.restore(tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert all(a is b for a, b in zip(adapter.parameters(), parameters, strict=True))
    assert adapter.engine.step_count == 1
    assert [helpers.step(model, optimizer, seed) for seed in range(1, 7)] == losses
    assert helpers.rank_history(adapter) == ranks
    others = helpers.attach(models.build(), router="after_warmup", config={"gamma": 2.0})
    with pytest.raises(drlora_torch.CheckpointError, match="gamma"):
        others.restore(tmp_path)
    with pytest.raises(drlora_torch.CheckpointError, match="other options"):
        helpers.attach(models.build()).restore(tmp_path)


# -- damage ------------------------------------------------------------------------------------


def refused(path: Path, match: str, family: str = "olmoe", **changes: Any) -> None:
    """Loading fails with a clear error and the model is as it was."""
    model = models.build(family, **changes)
    picture = Picture(model)
    with pytest.raises(drlora_torch.CheckpointError, match=match):
        drlora_torch.load(model, path)
    picture.assert_unchanged(model)
    assert drlora_torch.attach(model, helpers.engine()).ranks()


def rewrite(
    path: Path,
    tensors: Callable[[dict[str, torch.Tensor]], None] = lambda _: None,
    description: Callable[[dict[str, Any]], None] = lambda _: None,
) -> None:
    """Change a saved adapter by hand."""
    with safe_open(path / FILE, framework="pt") as file:
        told = json.loads(file.metadata()["drlora"])
    held = load_file(path / FILE)
    tensors(held)
    description(told)
    save_file(held, path / FILE, metadata={"drlora": json.dumps(told)})


LAYER = "model.layers.1.mlp.experts"
OWNER, LORA = f"{LAYER}/owner", f"{LAYER}/down_proj/lora_A"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trained(router="trainable").save_pretrained(tmp_path)
    return tmp_path


def test_truncated_anywhere(saved: Path) -> None:
    whole = (saved / FILE).read_bytes()
    size = len(whole)
    model = models.build()
    picture = Picture(model)
    cuts = {0, 1, 7, 8, 9, 100, size // 2, size - 1, *range(0, size, max(size // 40, 1))}
    for cut in sorted(cuts - {size}):
        (saved / FILE).write_bytes(whole[:cut])
        with pytest.raises(drlora_torch.CheckpointError, match="damaged or truncated"):
            drlora_torch.load(model, saved)
    (saved / FILE).write_bytes(whole + b"more")
    with pytest.raises(drlora_torch.CheckpointError, match="damaged or truncated"):
        drlora_torch.load(model, saved)
    picture.assert_unchanged(model)


def test_missing_and_foreign_files(saved: Path) -> None:
    refused(saved / "nowhere", "no adapter at")
    save_file({"weight": torch.zeros(2)}, saved / FILE)
    refused(saved, "not a drlora adapter")
    (saved / FILE).write_bytes(b"\x80\x04K\x01.")  # a pickle
    refused(saved, "damaged or truncated")
    for text in ("[]", "3", "{", "[" * 100_000):
        save_file({"weight": torch.zeros(2)}, saved / FILE, metadata={"drlora": text})
        refused(saved, "description|damaged")
    (saved / FILE).unlink()
    refused(saved, "no adapter at")


def test_other_models(saved: Path) -> None:
    refused(saved, "down_proj|gate_up_proj", intermediate_size=20)
    refused(saved, "has 6 experts, the adapter is for 8", num_experts=6)
    refused(saved, r"a layer 'model\.layers\.1.* does not have", num_hidden_layers=1)
    refused(saved, r"a layer 'model\.layers\.0.* does not have", "nemotron_h")


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda held: held.pop(key)


def _put(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    return lambda held: held.update({key: value(held[key]).contiguous()})


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        for key in keys[:-1]:
            told = told[key]
        told[keys[-1]] = to

    return change


def _at(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


ROUTER = "router/model.layers.1.mlp.gate.weight"
ENGINE = f"{LAYER}/engine"
DAMAGED_TENSORS: list[tuple[Callable[..., None], str]] = [
    (_drop(OWNER), "lacks tensor"),
    (_drop(LORA), "lacks tensor"),
    (_drop(ROUTER), "lacks tensor"),
    (_drop(f"{LAYER}/ages"), "lacks tensor"),
    (_drop(f"{ENGINE}/ranks"), "cannot be loaded|complete"),
    (lambda held: held.update(more=torch.zeros(1)), "has an unknown tensor 'more'"),
    (lambda held: held.update({"x/engine/ranks": torch.zeros(1)}), "not a complete adapter"),
    (lambda held: held.update({"router/x": torch.zeros(1)}), "has an unknown tensor"),
    (lambda held: held.update({f"{ENGINE}/more": torch.zeros(1)}), "cannot be loaded"),
    (_put(LORA, _at(0, float("nan"))), "not finite"),
    (_put(ROUTER, _at(0, float("inf"))), "not finite"),
    (_put(LORA, lambda t: t[:, :-1]), "has shape"),
    (_put(ROUTER, lambda t: t[:-1]), "has shape"),
    (_put(LORA, lambda t: t.to(torch.int32)), "wrong dtype"),
    (_put(OWNER, lambda t: t.double()), "wrong dtype"),
    (_put(f"{LAYER}/ages", lambda t: t.float()), "wrong dtype"),
    (_put(f"{LAYER}/ages", _at(0, -2)), "ages of slots are impossible"),
    (_put(OWNER, _at(0, 7)), "does not hold the saved ranks"),
    (_put(OWNER, _at(0, 800)), "does not hold the saved ranks"),
    (_put(f"{LAYER}/position", _at(0, 5)), "does not hold the saved ranks"),
    (_put(f"{ENGINE}/ranks", _at(0, 8)), "does not hold the saved ranks|budget"),
    (_put(f"{ENGINE}/ranks", _at(0, 99)), "ranks lie in"),
    (_put(f"{ENGINE}/importance", _at(0, float("nan"))), "non-finite"),
    (_put(LORA, _at(0, 3e38)), r"holds values above 1e\+18"),
    *(
        (_put(f"{ENGINE}/{field}", _at(0, 1e300)), r"holds 1e\+300; accepted: at most 1e\+100")
        for field in ("routing", "importance")
    ),
    (_put(f"{ENGINE}/importance_count", _at(0, 2**60)), "accepted: at most"),
    (_put(f"{ENGINE}/routing", lambda t: t.bfloat16()), "complete|cannot be loaded"),
    (_put(LORA, lambda t: t + 1.0), "a slot nobody owns is not 0"),
]


@pytest.mark.parametrize(("change", "match"), one_in(3, DAMAGED_TENSORS))
def test_damaged_tensors(saved: Path, change: Callable[..., None], match: str) -> None:
    rewrite(saved, tensors=change)
    refused(saved, match)


DAMAGED_DESCRIPTIONS: list[tuple[Callable[..., None], str]] = [
    (
        _set("version", to=3),
        "format version 3; this drlora reads 2 .*newer",
    ),
    *(
        (_set("version", to=garbage), "has format version .*; this drlora reads")
        for garbage in (0, -1, 1.0, 2.0, True, "2", None, [1], {})
    ),
    (_drop("version"), "not a complete adapter"),
    (_drop("engine"), "not a complete adapter"),
    (_drop("skipped_steps"), "not a complete adapter"),
    *(
        (_set("skipped_steps", to=value), "skipped_steps is .*; accepted: whole numbers from 0 to")
        for value in ("many", float("inf"), 1.5, True, None, -5, 10**400)
    ),
    (_set("options", "alpha", to=1e308), r"loaded: alpha: must be at most 1,000,000"),
    (_set("options", "attention_alpha", to=1e308), r"attention_alpha: must be at most 1,000,000"),
    *((_set("engine", "step", to=value), "step") for value in (10**400, 2**54, True, 1.5)),
    (_set("engine", "layers", LAYER, "observed", to=True), r"in the middle of engine\.step"),
    (_set("engine", "layers", LAYER, "observed", to=1), "observed"),
    *(
        (_set("engine", "layers", LAYER, "routing_count", to=value), "routing_count")
        for value in (True, 1.5, 10**400)
    ),
    (_drop("base"), "not a complete adapter"),
    (_set("base", to=None), "has no fingerprint of its base model.* check_base=False"),
    (_set("options", to=[]), "complete|cannot be loaded"),
    (_set("options", "alpha", to=-1.0), "alpha"),
    (_set("options", "colour", to="red"), "colour"),
    (_set("options", "layout", to="masked"), "has shape"),
    (_set("options", "router", to="frozen"), "has an unknown tensor"),
    (_set("options", "targets", to=["gate_up_proj"]), "has an unknown tensor"),
    (_set("engine", "version", to=9), "version 9"),
    (_set("engine", "step", to=-1), "step"),
    (_set("engine", "config", "r_max", to=1), "r_max"),
    (_set("engine", "config", "r_target", to=5), "has shape"),
    (_set("engine", "layers", to={}), "complete|layers"),
    (_set("layers", to={}), "unknown tensor"),
    (_set("layers", to=[]), "unknown tensor"),
]


@pytest.mark.parametrize(
    ("change", "match"),
    one_in(3, DAMAGED_DESCRIPTIONS),
    ids=[str(i) for i in range(len(DAMAGED_DESCRIPTIONS))],
)
def test_damaged_descriptions(saved: Path, change: Callable[..., None], match: str) -> None:
    rewrite(saved, description=change)
    refused(saved, match)


def test_masked_slots_stay_in_their_range(tmp_path: Path) -> None:
    trained(2, layout="masked").save_pretrained(tmp_path)

    def swap_experts(held: dict[str, torch.Tensor]) -> None:
        held[OWNER] = torch.where(held[OWNER] >= 0, 7 - held[OWNER], held[OWNER])

    rewrite(tmp_path, tensors=swap_experts)
    refused(tmp_path, "another expert's range")


def test_load_onto_an_adapted_model(saved: Path) -> None:
    model = models.build()
    adapter = helpers.attach(model)
    picture = Picture(model)
    with pytest.raises(drlora_torch.AttachError, match="already"):
        drlora_torch.load(model, saved)
    picture.assert_unchanged(model)
    assert adapter.ranks()
