"""LoRA of attention, shared experts and dense layers: which Linears, and their function."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from drlora_core import UnknownLayerError
from drlora_torch import AttachError
from drlora_torch.lifecycle import dense_choice
from tests.torch import helpers, models
from tests.torch.dense import RANK, adapted, fill, linears, logits, train
from tests.torch.test_life import Picture

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
CHOSEN = {
    "olmoe": (8, ATTENTION),
    "mixtral": (8, ATTENTION),
    "qwen2_moe": (14, ATTENTION | MLP),  # a shared expert, but not its gate H -> 1
    "deepseek_v3": (24, LATENT | MLP),  # shared experts and a dense layer
}


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
    "rank 0": ({"attention_rank": 0}, ValueError, "must be at least 1"),
    "rank True": ({"attention_rank": True}, ValueError, "valid integer"),
    "alpha 0": ({"attention_alpha": 0.0}, ValueError, "must be above 0"),
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


class Twice(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


class TinyIndexer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq_b = nn.Linear(32, 32)


def _change(model: Any, what: str) -> None:
    attention = model.model.layers[0].self_attn
    if what == "forward":
        attention.q_proj = Twice(32, 32, bias=False)
    elif what == "parametrized":
        nn.utils.parametrizations.weight_norm(attention.q_proj)
    elif what == "pruned":
        prune.random_unstructured(attention.q_proj, "weight", 0.3)
    elif what == "repeated":
        model.model.layers[1].self_attn.q_proj = attention.q_proj
    elif what == "indexer":
        attention.indexer = TinyIndexer()
    elif what == "score":
        model.model.score = nn.Sequential(nn.Linear(32, 16))
    elif what == "head":
        model.reward = nn.Linear(32, 16)


UNUSUAL = {
    "forward": (7, "self_attn.q_proj", "Twice has a forward of its own"),
    "parametrized": (7, "self_attn.q_proj", "computed from other parameters"),
    "pruned": (7, "self_attn.q_proj", "computed from other parameters"),
    "repeated": (6, "self_attn.q_proj", "uses it at several places"),
    "score": (8, "score.0", "a head beside the base model"),
    "head": (8, "reward", "a head beside the base model"),
    "indexer": (8, "", "in an indexer"),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_linears_are_left_out(what: str, caplog: pytest.LogCaptureFixture) -> None:
    count, target, why = UNUSUAL[what]
    model = models.build()
    _change(model, what)
    with caplog.at_level(logging.INFO):
        adapter = helpers.attach(model, attention_rank=RANK)
    assert len(linears(adapter)) == count
    assert why in caplog.text
    adapter.detach()
    if target:
        with pytest.raises(AttachError, match=why):
            helpers.attach(model, attention_rank=RANK, attention_targets=[target])
    else:
        helpers.attach(model, attention_rank=RANK, attention_targets=["indexer.wq_b"])


def test_a_spread_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_choice, "is_spread", lambda model: True)
    with pytest.raises(AttachError, match="load the whole model in each process"):
        helpers.attach(models.build(), attention_rank=RANK)
    helpers.attach(models.build())


def test_linears_that_are_never_called_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = models.build()
    model.model.unused = nn.Linear(32, 16)
    adapter = helpers.attach(model, attention_rank=RANK)
    with caplog.at_level(logging.WARNING):
        train(model, adapter, range(2))
    assert caplog.text.count("1 of 9 Linears that attention_rank adapts got no gradient") == 1
    assert "(model.unused)" in caplog.text


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
