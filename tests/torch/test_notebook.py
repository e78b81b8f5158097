"""What an adapter shows: in every state, without waiting, and with the numbers that PEFT counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import drlora_torch
from drlora_core import AllocatorEngine, PolicyError
from drlora_torch.errors import ArgumentError, AttachError
from drlora_torch.models.quantization.in_memory import quantize_experts
from tests.core.test_notebook import HOSTILE, read_html
from tests.torch import helpers, models


def trained(steps: int = 5) -> tuple[Any, drlora_torch.Adapter]:
    model = models.build()
    adapter = helpers.attach(model)
    optimizer = helpers.adamw(adapter)
    for seed in range(steps):
        helpers.step(model, optimizer, seed)
    return model, adapter


def counts(adapter: drlora_torch.Adapter) -> str:
    trainable, total = adapter.get_nb_trainable_parameters()
    share = 100 * trainable / total
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


def test_an_adapter_is_shown_in_every_state() -> None:
    _, adapter = trained()
    assert repr(adapter).startswith("Adapter('default', active, 2 layers of 8 experts, total rank")
    for state, change in (
        ("active", lambda: None),
        ("merged", adapter.merge),
        ("active", adapter.unmerge),
        ("detached", adapter.detach),
    ):
        change()
        assert f"'default', {state}, " in repr(adapter)
        assert f"default, {state}" in read_html(adapter)
        assert f"default, {state}" in adapter.summary()


def test_dense_linears_and_a_disabled_adapter_are_shown() -> None:
    adapter = helpers.attach(models.build(), attention_rank=4)
    with adapter.disabled():
        assert "'default', disabled, " in repr(adapter)
        assert "default, disabled" in read_html(adapter)
    assert "8 dense Linears of rank 4" in adapter.summary()
    assert "8 dense Linears of rank 4" in read_html(adapter)
    adapter.detach()
    assert adapter.storage == "no adapted experts"
    assert "dense" not in adapter.summary()


def test_a_summary_has_the_numbers() -> None:
    _, adapter = trained()
    ranks = np.concatenate(list(adapter.ranks().values()))
    text = adapter.summary()
    assert repr(text) == str(text)  # a prompt shows its lines
    for part in (
        f"{ranks.min()} to {ranks.max()}, mean {ranks.mean():.2f}; total {ranks.sum()} of 64",
        "events         1 of 2, the last after step 4",
        "skipped steps  0",
        "experts in float32",
        counts(adapter),
    ):
        assert part in text
    cells = read_html(adapter)
    first = adapter.ranks()["model.layers.0.mlp.experts"]
    assert cells[cells.index("model.layers.0.mlp.experts") + 5] == str(first.sum())


def test_named_adapters_say_which_is_active() -> None:
    model = models.build()
    law, intent = (helpers.attach(model, adapter_name=name) for name in ("law", "intent"))
    assert "'law', inactive" in repr(law)
    assert "'intent', active" in repr(intent)


def test_to_show_an_adapter_closes_no_step() -> None:
    _, adapter = trained()
    engine, closed = adapter.engine, []
    engine.defer(lambda: closed.append("now"))
    assert "one step pending" in adapter._repr_html_()
    assert "active" in repr(adapter)
    assert "another one pending" in repr(engine)
    assert engine.pending
    assert "one step pending" not in adapter.summary()
    assert closed == ["now"]


def test_a_hostile_name_of_a_layer_is_harmless() -> None:
    model = nn.Module()
    name = HOSTILE.replace(".", "").replace("\ud800", "")
    model.add_module(name, models.build())
    adapter = helpers.attach(model)
    assert any("<script>" in cell for cell in read_html(adapter))  # as text
    assert len(repr(adapter)) < 200


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_parameters_are_counted(options: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    model = models.build()
    head = sum(p.numel() for p in model.lm_head.parameters()) if options else 0
    base = sum(parameter.numel() for parameter in model.parameters())
    adapter = helpers.attach(model, **options)
    lora = 2 * 8 * 4 * (32 + 48 + 24 + 32)
    assert adapter.get_nb_trainable_parameters() == (lora + head, base + lora)
    adapter.print_trainable_parameters()
    assert capsys.readouterr().out == counts(adapter) + "\n"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_parameters_are_counted_as_peft_counts_them() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(models.build(), config)
    adapter = helpers.attach(wrapped)
    assert adapter.get_nb_trainable_parameters() == wrapped.get_nb_trainable_parameters()
    trainable, _ = adapter.get_nb_trainable_parameters()
    assert trainable > sum(p.numel() for p in adapter.lora_parameters())  # PEFT's own too


def test_packed_experts_count_as_what_they_stand_for() -> None:
    pytest.importorskip("bitsandbytes")
    model = models.build().to(torch.bfloat16)
    base = sum(parameter.numel() for parameter in model.parameters())
    quantize_experts(model)
    adapter = helpers.attach(model)
    trainable, total = adapter.get_nb_trainable_parameters()
    assert total == base + trainable
    assert "experts in nf4" in repr(adapter)
    adapter.detach()
    assert adapter.get_nb_trainable_parameters()[1] == base


def test_packed_linears_count_as_peft_counts_them() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model = models.build()
    base = sum(parameter.numel() for parameter in model.parameters())
    projection = model.model.layers[0].self_attn.q_proj
    packed = bitsandbytes.nn.Linear4bit(32, 32, bias=False, quant_type="nf4")
    packed.load_state_dict(projection.state_dict())
    model.model.layers[0].self_attn.q_proj = packed.to("cpu")
    assert packed.weight.dtype == torch.uint8
    adapter = helpers.attach(model)
    trainable, total = adapter.get_nb_trainable_parameters()
    assert total == base + trainable
    assert peft.PeftModel.get_nb_trainable_parameters(model) == (trainable, total)


def test_frames_of_an_adapter() -> None:
    pytest.importorskip("pandas")
    _, adapter = trained()
    frame = adapter.to_frame()
    for name, ranks in adapter.ranks().items():
        rows = frame[frame["layer"] == name]
        np.testing.assert_array_equal(rows["rank"], ranks)
        np.testing.assert_array_equal(rows["saliency"], adapter.engine.saliency(name))
    grown = adapter.events_frame()
    (event,) = adapter.events
    assert grown["delta"].sum() == sum(delta.sum() for delta in event.deltas.values())
    assert set(grown["step"]) == {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "poled"}, "must be 'pooled' or 'masked', got 'poled'; did you mean 'pooled'"),
        ({"router": "frozn"}, "got 'frozn'; did you mean 'frozen'"),
        ({"newborn": "plane"}, "got 'plane'; did you mean 'plain'"),
        ({"dropout": 1.0}, "dropout\n  must be at least 0.0 and below 1.0, got 1.0"),
        ({"alpha": 0.0}, "alpha\n  must be above 0.0, got 0.0"),
        ({"alpha": 1e308}, r"alpha\n  must be at most 1,000,000, got 1e\+308: the scale"),
        ({"layuot": "pooled"}, r"attach\(\) has no argument 'layuot'; did you mean 'layout'"),
    ],
    ids=str,
)
def test_a_misspelled_option_is_refused_with_near_misses(
    options: dict[str, Any], message: str
) -> None:
    model = models.build()
    with pytest.raises(ValueError, match=message):
        helpers.attach(model, **options)
    assert drlora_torch.adapters(model) == {}


def test_a_misspelled_keyword_is_both_kinds_of_error(tmp_path: Path) -> None:
    load: Any = drlora_torch.load
    with pytest.raises(TypeError, match=r"load\(\) has no argument 'trainabel'") as caught:
        load(models.build(), tmp_path, trainabel=False)
    assert isinstance(caught.value, ArgumentError)
    assert isinstance(caught.value, AttachError)


def test_a_policy_that_is_none_is_refused_before_a_file_is_read(tmp_path: Path) -> None:
    policy: Any = "gredy"
    with pytest.raises(PolicyError, match="did you mean 'greedy'"):
        drlora_torch.load(models.build(), tmp_path / "none", policy=policy)
    with pytest.raises(PolicyError, match="did you mean 'greedy'"):
        AllocatorEngine(helpers.engine().config, policy=policy)
