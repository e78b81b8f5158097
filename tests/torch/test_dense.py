"""LoRA of attention, shared experts and dense layers as a part of the adapter."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import drlora_torch
from drlora_core import UnknownLayerError
from drlora_torch import AttachError
from drlora_torch.adapter import state_of
from drlora_torch.attached import Attached
from drlora_torch.lifecycle import dense
from drlora_torch.lora.dense import DenseLoRA
from drlora_torch.merge import in_place
from drlora_torch.storage import adapter_file
from tests.torch import helpers, models
from tests.torch.test_life import Picture

RANK = 4
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
CHOSEN = {
    "olmoe": (8, ATTENTION),
    "mixtral": (8, ATTENTION),
    "qwen2_moe": (14, ATTENTION | MLP),  # a shared expert, but not its gate H -> 1
    "deepseek_v3": (24, LATENT | MLP),  # shared experts and a dense layer
}


def linears(adapter: drlora_torch.Adapter) -> dict[str, Any]:
    return state_of(adapter).dense


@torch.no_grad()
def fill(adapter: drlora_torch.Adapter, seed: int = 0) -> drlora_torch.Adapter:
    """Draw B of the experts and of the Linears, so that both matter."""
    helpers.fill(adapter, seed)
    generator = torch.Generator().manual_seed(seed)
    for each in linears(adapter).values():
        drawn = torch.randn(each.lora.lora_B.shape, generator=generator)
        each.lora.lora_B.copy_(0.1 * drawn)
    return adapter


def adapted(family: str = "olmoe", **options: Any) -> tuple[Any, drlora_torch.Adapter]:
    model = models.build(family)
    return model, fill(helpers.attach(model, **{"attention_rank": RANK, **options}))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model.eval()(models.tokens()).logits
    return out


def train(model: Any, adapter: drlora_torch.Adapter, seeds: range) -> list[float]:
    optimizer = helpers.adamw(adapter)
    return [helpers.step(model.train(), optimizer, seed) for seed in seeds]


# -- which -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CHOSEN)
def test_all_dense_linears_are_adapted(family: str) -> None:
    model, adapter = adapted(family)
    count, leaves = CHOSEN[family]
    assert len(linears(adapter)) == count
    assert {name.rpartition(".")[2] for name in linears(adapter)} == leaves
    assert f"{count} dense Linears" in repr(adapter)
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in adapter.parameters()}
    assert learning == {id(p) for p in adapter.lora_parameters()}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 4),
        ("layers.1.self_attn.q_proj", 1),
        ("shared_expert.down_proj", 2),
        ("down_proj", 2),
    ],
)
def test_targets_narrow_it(targets: Any, count: int) -> None:
    _, adapter = adapted("qwen2_moe", attention_targets=targets)
    assert len(linears(adapter)) == count


def _untied(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mistyped": (
        {"attention_targets": "q_porj"},
        UnknownLayerError,
        "no module 'q_porj'; did you mean 'q_proj'",
    ),
    "head": ({"attention_targets": "lm_head"}, AttachError, "it is the output head"),
    "router": ({"attention_targets": ["q_proj", "mlp.gate"]}, AttachError, "it is a router"),
    "experts": ({"attention_targets": "experts"}, AttachError, "in the routed experts"),
    "no Linear": (
        {"attention_targets": "self_attn"},
        AttachError,
        "is a OlmoeAttention, no Linear; name the Linears inside",
    ),
    "small": (
        {"attention_rank": 16, "attention_targets": "k_proj"},
        AttachError,
        "smaller side, 16, is not larger than attention_rank=16",
    ),
    "none": ({"attention_rank": 32}, AttachError, "no Linear to adapt"),
    "whole": (
        {"modules_to_save": ["q_proj"], "attention_targets": ["q_proj"]},
        AttachError,
        "modules_to_save trains it whole",
    ),
    "rank 0": ({"attention_rank": 0}, ValueError, "greater than or equal to 1"),
    "rank True": ({"attention_rank": True}, ValueError, "valid integer"),
    "alpha 0": ({"attention_alpha": 0.0}, ValueError, "greater than 0"),
    "targets alone": (
        {"attention_rank": None, "attention_targets": ["q_proj"]},
        ValueError,
        r"attention_targets=\('q_proj',\) needs attention_rank",
    ),
    "alpha alone": (
        {"attention_rank": None, "attention_alpha": 4.0},
        ValueError,
        "attention_alpha=4.0 needs attention_rank",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model(case: str) -> None:
    options, error, message = REFUSED[case]
    model = models.build()
    picture = Picture(model)
    with pytest.raises(error, match=message):
        helpers.attach(model, **{"attention_rank": RANK, **options})
    picture.assert_unchanged(model)


def test_shared_weights_are_left_alone() -> None:
    model = models.build(tie_word_embeddings=True)
    _untied(model)
    adapter = helpers.attach(model, attention_rank=RANK, attention_targets=["k_proj"])
    adapter.detach()
    adapter = helpers.attach(model, attention_rank=RANK)
    assert not any("q_proj" in name or "lm_head" in name for name in linears(adapter))
    adapter.detach()
    with pytest.raises(AttachError, match="another module shares its weight"):
        helpers.attach(model, attention_rank=RANK, attention_targets=["q_proj"])


def test_a_spread_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "is_spread", lambda model: True)
    with pytest.raises(AttachError, match="load the whole model in each process"):
        helpers.attach(models.build(), attention_rank=RANK)
    helpers.attach(models.build())


def test_linears_that_are_never_called_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = models.build()
    model.unused = nn.Linear(32, 16)
    adapter = helpers.attach(model, attention_rank=RANK)
    with caplog.at_level(logging.WARNING):
        train(model, adapter, range(2))
    assert caplog.text.count("1 of 9 Linears that attention_rank adapts got no gradient") == 1
    assert "(unused)" in caplog.text


# -- the function ------------------------------------------------------------------------------


class Slow(nn.Module):
    """y = W x + s B (A x), one output after the other."""

    def __init__(self, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.linear, self.scaling = linear, scaling
        self.lora_A, self.lora_B = (nn.Parameter(m.detach().clone()) for m in (lora_A, lora_B))

    def forward(self, inputs: Tensor) -> Tensor:
        inner = torch.stack([(row * inputs).sum(-1) for row in self.lora_A], dim=-1)
        outer = torch.stack([(row * inner).sum(-1) for row in self.lora_B], dim=-1)
        return functional.linear(inputs, self.linear.weight, self.linear.bias) + (
            self.scaling * outer
        )


def against_a_slow_reference(family: str, **options: Any) -> None:
    options = {"attention_rank": RANK, "attention_alpha": 6.0, **options}
    model = models.build(family, torch.float64)
    adapter = helpers.attach(model, **options)
    helpers.fill(adapter)
    other = models.build(family, torch.float64)
    helpers.fill(helpers.attach(other, rslora=options.get("rslora", False)))
    slow: dict[str, Slow] = {}
    generator = torch.Generator().manual_seed(1)
    scaling = 6.0 / (RANK**0.5 if options.get("rslora") else RANK)
    for name, each in linears(adapter).items():
        with torch.no_grad():
            each.lora.lora_B.copy_(torch.randn(each.lora.lora_B.shape, generator=generator))
        slow[name] = Slow(other.get_submodule(name), each.lora.lora_A, each.lora.lora_B, scaling)
        other.set_submodule(name, slow[name])
    losses = [m(**helpers.batch()).loss for m in (model, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for name, each in linears(adapter).items():
        for part in ("lora_A", "lora_B"):
            have, want = (getattr(o, part).grad for o in (each.lora, slow[name]))
            assert want.abs().max() > 0
            torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("family", CHOSEN)
def test_forward_and_gradients_are_those_of_a_slow_reference(family: str) -> None:
    against_a_slow_reference(family)


def test_rslora_scales_them_too() -> None:
    against_a_slow_reference("olmoe", rslora=True)


def test_a_fresh_one_changes_nothing_and_draws_from_no_global_stream() -> None:
    model = models.build("qwen2_moe")
    without = helpers.attach(model)
    before, rows = logits(model), [p.detach().clone() for p in without.parameters()]
    without.detach()
    state = torch.get_rng_state()
    adapter = helpers.attach(model, attention_rank=RANK)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), before)
    assert all(map(torch.equal, rows, adapter.parameters()))  # those of the experts come first
    drawn = {name: each.lora.lora_A.detach() for name, each in linears(adapter).items()}
    for name, lora_A in drawn.items():
        bound = 1 / lora_A.shape[1] ** 0.5  # Kaiming uniform, a = sqrt(5)
        assert 0.8 * bound < lora_A.abs().max() <= bound, name
    assert len({float(lora_A[0, 0]) for lora_A in drawn.values()}) == len(drawn)
    again = helpers.attach(models.build("qwen2_moe"), attention_rank=RANK)
    assert all(torch.equal(drawn[n], each.lora.lora_A) for n, each in linears(again).items())
    other = helpers.attach(models.build("qwen2_moe"), attention_rank=RANK, config={"seed": 1})
    assert not any(torch.equal(drawn[n], each.lora.lora_A) for n, each in linears(other).items())


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lora", [None, "bfloat16", "float64"])
def test_data_types(base: torch.dtype, lora: str | None) -> None:
    model = models.build(dtype=base)
    adapter = fill(helpers.attach(model, attention_rank=RANK, dtype=lora))
    wanted = torch.float32 if lora is None else getattr(torch, lora)
    assert {p.dtype for p in adapter.parameters()} == {wanted}
    assert model(**helpers.batch()).logits.dtype is base
    train(model, adapter, range(1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_training(reentrant: bool) -> None:
    runs = []
    for checkpointing in (False, True):
        model, adapter = adapted("qwen2_moe")
        if checkpointing:
            helpers.checkpoint_activations(model, reentrant=reentrant)
        runs.append((train(model, adapter, range(5)), helpers.rank_history(adapter)))
        assert adapter.events
    assert runs[0] == runs[1]


def test_dropout_applies_in_training_alone() -> None:
    model, _ = adapted(dropout=0.5, targets=["down_proj"])
    other, _ = adapted(targets=["down_proj"])
    assert torch.equal(logits(model), logits(other))
    inputs = models.tokens()
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = (model.train()(inputs).logits for _ in range(2))
    assert not torch.equal(first, second)


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


# -- several adapters --------------------------------------------------------------------------


def test_each_of_several_adapters_has_its_own(tmp_path: Path) -> None:
    alone = {}
    for name, options in (("a", {"attention_rank": 2}), ("b", {"attention_rank": RANK}), ("c", {})):
        model = models.build()
        adapter = helpers.attach(model, config={"seed": len(alone)}, **options)
        alone[name] = options, train(model, adapter, range(5)), logits(model)
    model = models.build()
    adapters = {
        name: helpers.attach(model, adapter_name=name, config={"seed": i}, **options)
        for i, (name, (options, _, _)) in enumerate(alone.items())
    }
    for name, adapter in adapters.items():
        adapter.activate()
        assert train(model, adapter, range(5)) == alone[name][1]
    for name, adapter in adapters.items():
        adapter.activate()
        assert torch.equal(logits(model), alone[name][2])
    model.save_pretrained(tmp_path)
    assert drlora_torch.load(models.build(), tmp_path / "b").options.attention_rank == RANK
    for adapter in adapters.values():
        adapter.detach()
    assert not any("drlora" in name for name in model.state_dict())
    assert torch.equal(logits(model), logits(models.build()))


# -- wrappers ----------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_data_parallelism_after_attach_trains_the_same(tmp_path: Path) -> None:
    model, adapter = adapted("qwen2_moe")
    want, final = train(model, adapter, range(3)), logits(model)
    for way in ("DDP", "fully_shard"):
        model, adapter = adapted("qwen2_moe")
        called: Any = model
        if way == "DDP":
            called = DistributedDataParallel(model)
        else:
            for layer in (*model.model.layers, model):
                fully_shard(layer)
        optimizer = helpers.adamw(adapter)
        assert [helpers.step(called, optimizer, seed) for seed in range(3)] == want
        assert adapter.is_sharded == (way == "fully_shard")
        adapter.save_pretrained(tmp_path / way)
        fresh = models.build("qwen2_moe")
        drlora_torch.load(fresh, tmp_path / way)
        assert torch.equal(logits(fresh), final)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(tmp_path / "all", state_dict=whole)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    drlora_torch.load(fresh, tmp_path / "all")
    assert torch.equal(logits(fresh), final)
    with pytest.raises(AttachError, match="processes hold those of this model together already"):
        helpers.attach(model, adapter_name="other", attention_rank=RANK)


@pytest.mark.usefixtures("one_process")
def test_linears_that_fully_shard_left_out_are_refused() -> None:
    model, adapter = adapted()
    ignored = set(next(iter(linears(adapter).values())).lora.parameters())
    fully_shard(model, ignored_params=ignored)
    optimizer = helpers.adamw(adapter)
    with pytest.raises(AttachError, match=r"left out 2 of 24 LoRA parameters \('dense/"):
        helpers.step(model, optimizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_model_trains_the_same() -> None:
    runs = []
    for compiled in (False, True):
        model, adapter = adapted()
        called: Any = model
        if compiled:
            called = torch.compile(model, backend="aot_eager", fullgraph=True)
        optimizer = helpers.adamw(adapter)
        runs.append([helpers.step(called, optimizer, seed) for seed in range(3)])
        with adapter.disabled():
            assert torch.equal(logits(called), logits(models.build()))
    assert runs[0] == runs[1]


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
