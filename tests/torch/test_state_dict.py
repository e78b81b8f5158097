"""An adapter in ``model.state_dict()``: all of it is taken, or the state is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint

import drlora_torch
from drlora_torch import CheckpointError
from tests.torch import helpers, models

PRUNE = {"policy": "prune", "r_init": 6}
MOVE = {"policy": "move", "r_init": 4, "move_share": 1.0}
State = dict[str, Tensor]
EXTRA = "model.layers.0.mlp.experts.drlora.adapter_state._extra_state"
ROWS = "model.layers.1.mlp.experts.drlora.projections.down_proj.lora_B"


def started(**options: Any) -> tuple[Any, drlora_torch.Adapter, torch.optim.Optimizer]:
    model = models.build().train()
    adapter = helpers.attach(model, **options)
    return model, adapter, helpers.adamw(adapter)


def trained(steps: int = 5, **options: Any) -> tuple[Any, drlora_torch.Adapter, Any]:
    """Past the first event, which follows step 4."""
    model, adapter, optimizer = started(**options)
    for seed in range(steps):
        helpers.step(model, optimizer, seed)
    return model, adapter, optimizer


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "masked"}, {"router": "trainable"}, {"config": PRUNE}, {"auto_step": False}],
    ids=str,
)
def test_training_goes_on_as_it_would_have(options: dict[str, Any], tmp_path: Path) -> None:
    """Weights, ranks, statistics, ages of newborn rows: the next steps are bit-identical."""

    def step(model: Any, adapter: Any, optimizer: Any, seed: int) -> float:
        loss = helpers.step(model, optimizer, seed)
        if "auto_step" in options:
            adapter.step()
        return loss

    one, first = started(**options), None
    for seed in range(5):
        step(*one, seed)
    torch.save([one[0].state_dict(), one[2].state_dict()], tmp_path / "both.pt")
    two = started(**options)
    weights, moments = torch.load(tmp_path / "both.pt", weights_only=True)
    assert str(two[0].load_state_dict(weights)) == "<All keys matched successfully>"
    two[2].load_state_dict(moments)
    assert helpers.rank_history(two[1]) == helpers.rank_history(one[1])
    for seed in range(5, 9):
        first = step(*one, seed)
        assert step(*two, seed) == first
    assert helpers.rank_history(two[1]) == helpers.rank_history(one[1])
    assert [e.step for e in two[1].events] == [e.step for e in one[1].events] != []


def test_the_state_of_wrapped_models_is_found() -> None:
    """Under any prefix, as in a LightningModule."""
    outer = [nn.ModuleDict({"inner": trained()[0]}), nn.ModuleDict({"inner": started()[0]})]
    outer[1].load_state_dict(outer[0].state_dict())
    logits = [each["inner"].eval()(models.tokens()).logits for each in outer]
    assert torch.equal(*logits)


def test_parameters_keep_their_identity_with_assign() -> None:
    """The optimizer holds them."""
    source, (model, adapter, optimizer) = trained()[0], started()
    before = [id(p) for p in adapter.parameters()]
    model.load_state_dict(source.state_dict(), assign=True)
    assert [id(p) for p in adapter.parameters()] == before
    assert torch.equal(source.eval()(models.tokens()).logits, model.eval()(models.tokens()).logits)
    assert helpers.step(model.train(), optimizer) > 0


def test_every_adapter_of_a_model_travels() -> None:
    both = []
    for steps in (3, 0):
        model = models.build().train()
        for name in ("law", "intent"):
            adapter = helpers.attach(model, adapter_name=name, router="trainable")
            optimizer = helpers.adamw(adapter)
            for seed in range(steps):
                helpers.step(model, optimizer, seed)
        both.append(model.eval())
    both[1].load_state_dict(both[0].state_dict())
    for name in ("law", "intent"):
        logits = []
        for model in both:
            assert drlora_torch.set_adapter(model, name).engine.step_count == 3
            logits.append(model(models.tokens()).logits)
        assert torch.equal(*logits)


def test_a_state_of_another_moment_leaves_the_base_and_the_others_alone() -> None:
    """Saved while one adapter trains the head, loaded while another is active."""
    model = models.build().eval()
    base = model(models.tokens()).logits
    head = helpers.attach(model.train(), adapter_name="head", modules_to_save="lm_head")
    optimizer = helpers.adamw(head)
    for seed in range(3):
        helpers.step(model, optimizer, seed)
    wanted = model.eval()(models.tokens()).logits
    state = copy.deepcopy(model.state_dict())
    helpers.attach(model, adapter_name="other")
    state |= {key: value for key, value in model.state_dict().items() if "drlora_other" in key}
    model.load_state_dict(state)
    untrained = model(models.tokens()).logits  # of the other one, but for the kernel's rounding
    torch.testing.assert_close(untrained, base, rtol=1e-5, atol=2e-6)
    head.activate()
    assert torch.equal(model(models.tokens()).logits, wanted)
    for name in ("head", "other"):
        drlora_torch.adapters(model)[name].detach()
    assert torch.equal(model(models.tokens()).logits, base)


def test_all_that_learns_keeps_its_identity_with_assign() -> None:
    options: dict[str, Any] = {"router": "trainable", "modules_to_save": "lm_head"}
    source, (model, adapter, optimizer) = trained(**options)[0], started(**options)
    before = [id(p) for p in adapter.parameters()]
    model.load_state_dict(source.state_dict(), assign=True)
    assert [id(p) for p in adapter.parameters()] == before
    values = [p.detach().clone() for p in adapter.parameters()]
    for seed in range(2):
        helpers.step(model, optimizer, seed)
    assert not any(torch.equal(a, b) for a, b in zip(values, adapter.parameters(), strict=True))


@pytest.mark.parametrize("config", [{}, PRUNE, MOVE], ids=["grow", "prune", "move"])
def test_the_size_never_changes(config: Any) -> None:
    """Checkpoints of torch.distributed are read into the state of a fresh adapter, in place."""
    model, adapter, optimizer = started(config=config)
    sizes = set()
    for seed in range(8):
        sizes.add(model.state_dict()[EXTRA].shape)
        helpers.step(model, optimizer, seed)
    assert len(adapter.events) == 2
    assert sizes == {model.state_dict()[EXTRA].shape}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("next_use", ["forward", "state_dict", "save"])
def test_a_state_that_is_written_in_place_is_taken(next_use: str, tmp_path: Path) -> None:
    """As checkpoints of torch.distributed are read, and as averages of weights are put in."""
    (source, first, moments), (model, adapter, optimizer) = trained(), started()
    checkpoint.save({"model": source.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    checkpoint.load({"model": model.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    if next_use == "state_dict":
        assert model.state_dict()
        assert adapter.engine.step_count == 5
    if next_use == "save":
        adapter.save_pretrained(tmp_path / "adapter")
        assert drlora_torch.load(models.build(), tmp_path / "adapter").engine.step_count == 5
    optimizer.load_state_dict(copy.deepcopy(moments.state_dict()))
    for seed in range(5, 8):
        assert helpers.step(model, optimizer, seed) == helpers.step(source, moments, seed)
    assert helpers.rank_history(adapter) == helpers.rank_history(first)


def test_a_state_written_in_place_that_does_not_fit_stops_every_use(tmp_path: Path) -> None:
    """The rows are gone already; nothing goes on with them until another state is loaded."""
    source, (model, adapter, _) = trained(config={"gamma": 0.5})[0], trained(2)
    adapter.save_pretrained(tmp_path / "before")
    kept = copy.deepcopy(model.state_dict())
    for key, value in model.state_dict().items():
        value.copy_(source.state_dict()[key])
    for use in (lambda: model(models.tokens()), lambda: adapter.save_pretrained(tmp_path)) * 2:
        with pytest.raises(CheckpointError, match="gamma"):
            use()
    model.load_state_dict(kept)
    wanted = model.eval()(models.tokens()).logits
    for key, value in model.state_dict().items():
        value.copy_(source.state_dict()[key])
    adapter.restore(tmp_path / "before", check_base=False)
    assert torch.equal(model(models.tokens()).logits, wanted)


def test_the_adapter_alone_is_a_complete_state() -> None:
    source, target = trained()[0], started()[0]
    alone = {key: value for key, value in source.state_dict().items() if ".drlora." in key}
    assert target.load_state_dict(alone, strict=False).missing_keys == []
    assert torch.equal(source.eval()(models.tokens()).logits, target.eval()(models.tokens()).logits)


def drop(*endings: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for key in [key for key in state if key.endswith(endings)]:
            del state[key]

    return change


def drop_lora(state: State) -> None:
    for key in [key for key in state if ".drlora." in key]:
        del state[key]


def cut(state: State) -> None:
    state[EXTRA] = state[EXTRA][:200]


def average(state: State) -> None:
    state[EXTRA] = 0.5 * state[EXTRA] + 0.5 * state[EXTRA]


def widen(state: State) -> None:
    state[ROWS] = torch.zeros(*state[ROWS].shape[:1], 3)


def spoil(state: State) -> None:
    state[ROWS] = torch.full_like(state[ROWS], float("nan"))


BAD: list[tuple[str, Callable[[State], None], str]] = [
    ("base alone", drop_lora, "has other weights of the experts, but not adapter 'default'"),
    ("rows without owners", drop("_extra_state"), "rows of the LoRA, but not whose they are"),
    ("rows missing", drop("lora_B"), "lacks tensor 'model.layers.0.mlp.experts/down_proj/lora_B'"),
    ("cut", cut, "adapter in the state dict is damaged"),
    ("averaged", average, r"is torch\.float32.*average only floating-point values"),
    ("other shape", widen, r"has shape \(32, 3\), not \(32, 32\)"),
    ("not finite", spoil, "not finite"),
]


@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("change", "message"), [r[1:] for r in BAD], ids=[r[0] for r in BAD])
def test_what_does_not_fit_is_refused_and_changes_nothing(
    change: Callable[[State], None], message: str, strict: bool
) -> None:
    state = trained()[0].state_dict()
    change(state)
    model, adapter, _ = trained(2)
    before, engine = copy.deepcopy(model.state_dict()), adapter.engine.state_dict()
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(state, strict=strict)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert adapter.engine.state_dict()["step"] == engine["step"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "masked"}, "other options or layers: layout"),
        ({"config": {"r_max": 7}}, "r_max"),
        ({"layers": "*.0.*"}, "other options or layers: layers"),
    ],
    ids=str,
)
def test_another_adapter_is_refused(options: dict[str, Any], message: str) -> None:
    model, _, _ = started(**options)
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(trained()[0].state_dict(), strict=False)


def test_an_adapter_of_another_name_or_base_is_refused() -> None:
    source = trained()[0].state_dict()
    alone = {key: value for key, value in source.items() if ".drlora." in key}
    model = models.build()
    helpers.attach(model, adapter_name="law")
    with pytest.raises(CheckpointError, match="but not adapter 'law'"):
        model.load_state_dict(alone, strict=False)
    other = models.build(seed=7)
    helpers.attach(other)
    with pytest.raises(CheckpointError, match="the base model is another"):
        other.load_state_dict(alone, strict=False)


def test_a_refused_state_opens_no_door_to_a_part() -> None:
    model = models.build()
    for name, layer in (("x", "*.0.*"), ("y", "*.1.*")):
        adapter = helpers.attach(model, adapter_name=name, layers=layer)
    state = copy.deepcopy(model.state_dict())
    state["model.layers.1.mlp.experts.drlora_y.projections.down_proj.lora_B"][:] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        model.load_state_dict(state)
    part = {k.removeprefix("model.layers.0."): v for k, v in state.items()}
    with pytest.raises(CheckpointError, match="of a part of the model"):
        model.model.layers[0].load_state_dict(part, strict=False)
    assert adapter.engine.step_count == 0


def test_a_part_of_the_model_is_refused() -> None:
    source, target = trained()[0], started()[0]
    with pytest.raises(CheckpointError, match="call load_state_dict of the whole model"):
        target.model.layers.load_state_dict(source.model.layers.state_dict())
    target.lm_head.load_state_dict(source.lm_head.state_dict())


@pytest.mark.parametrize("loaded_inside", [True, False])
@pytest.mark.parametrize("saved_inside", [True, False])
def test_the_base_keeps_its_routers(saved_inside: bool, loaded_inside: bool) -> None:
    """Whichever values are in the model while a state is taken or loaded."""
    (source, adapter, _), (target, other, _) = (
        trained(router="trainable"),
        started(router="trainable"),
    )
    with adapter.disabled():
        base, inside = source.eval()(models.tokens()).logits, source.state_dict()
        inside = copy.deepcopy(inside)
    state = inside if saved_inside else source.state_dict()
    with other.disabled() if loaded_inside else contextlib.nullcontext():
        assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(source(models.tokens()).logits, target.eval()(models.tokens()).logits)
    assert torch.equal(other.detach()(models.tokens()).logits, base)


def test_a_plain_model_knows_the_keys_it_does_not_have() -> None:
    found = models.build().load_state_dict(trained()[0].state_dict(), strict=False)
    assert EXTRA in found.unexpected_keys


@pytest.mark.parametrize("config", [{}, PRUNE], ids=["grow", "prune"])
def test_averages_of_weights_can_be_saved_and_loaded(config: Any, tmp_path: Path) -> None:
    """Slots that were freed hold averages, which no expert uses."""
    model, adapter, optimizer = started(config=config)
    average = [p.detach().clone() for p in adapter.parameters()]
    for seed in range(6):
        helpers.step(model, optimizer, seed)
        for kept, now in zip(average, adapter.parameters(), strict=True):
            kept.lerp_(now.detach(), 0.3)
    with torch.no_grad():
        for kept, now in zip(average, adapter.parameters(), strict=True):
            now.copy_(kept)
    wanted = model.eval()(models.tokens()).logits
    adapter.save_pretrained(tmp_path)
    loaded = models.build()
    drlora_torch.load(loaded, tmp_path)
    other = started(config=config)[0]
    other.load_state_dict(model.state_dict())
    for each in (loaded, other):
        assert torch.equal(each.eval()(models.tokens()).logits, wanted)
    for lora in (layer.lora for layer in drlora_torch.adapters(other)["default"].layers.values()):
        assert not any(p[helpers.free(lora)].any() for p in lora.parameters())


def test_weights_that_are_not_finite_replace_no_file(tmp_path: Path) -> None:
    _, adapter, _ = trained()
    adapter.save_pretrained(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        adapter.parameters()[0][0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="not finite: the training has diverged"):
        adapter.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_model_on_the_meta_device_has_no_adapter_to_give() -> None:
    """Accelerate's fsdp_cpu_ram_efficient_loading moves models there and back."""
    model = models.build()
    helpers.attach(model)
    model.to("meta")
    with pytest.raises(CheckpointError, match="fsdp_cpu_ram_efficient_loading to false"):
        model.state_dict()
