"""``discover`` describes every family, says what stands in the way, and attaches nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import drlora_torch
from drlora_torch.models.records import MoELayer
from tests.torch import helpers, models
from tests.torch.test_life import Picture

GATED = {"gate_up_proj": (32, 48), "down_proj": (24, 32)}
EXPECTED = {
    "olmoe": ("model.layers.{}.mlp.experts", (0, 1), "OlmoeExperts", GATED, "gate"),
    "mixtral": ("model.layers.{}.mlp.experts", (0, 1), "MixtralExperts", GATED, "gate"),
    "qwen3_moe": ("model.layers.{}.mlp.experts", (0, 1), "Qwen3MoeExperts", GATED, "gate"),
    "qwen2_moe": ("model.layers.{}.mlp.experts", (0, 1), "Qwen2MoeExperts", GATED, "gate"),
    "deepseek_v3": ("model.layers.{}.mlp.experts", (1, 2), "DeepseekV3Experts", GATED, "gate"),
    "gpt_oss": ("model.layers.{}.mlp.experts", (0, 1), "GptOssExperts", GATED, "router"),
    "nemotron_h": (
        "model.layers.{}.mixer.experts",
        (0, 2),
        "NemotronHExperts",
        {"up_proj": (16, 24), "down_proj": (24, 16)},
        "gate",
    ),
}


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_every_family(family: str) -> None:
    template, numbers, experts_class, projections, router = EXPECTED[family]
    model = models.build(family, torch.bfloat16)
    picture = Picture(model)
    found = drlora_torch.discover(model)
    picture.assert_unchanged(model)
    assert found == [
        MoELayer(
            name=template.format(number),
            experts_class=experts_class,
            num_experts=models.EXPERTS,
            projections=projections,  # type: ignore[arg-type]
            router=template.format(number).removesuffix("experts") + router,
            dtype="bfloat16",
            obstacle=None,
        )
        for number in numbers
    ]


def test_records_are_frozen_and_plain() -> None:
    record = drlora_torch.discover(models.build())[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.name = "other"  # type: ignore[misc]
    assert dataclasses.asdict(record)["projections"]["down_proj"] == (24, 32)


def test_attached_model_is_described_alike() -> None:
    model = models.build()
    before = drlora_torch.discover(model)
    helpers.attach(model)
    assert drlora_torch.discover(model) == before


def test_models_without_experts() -> None:
    assert drlora_torch.discover(nn.Linear(3, 3)) == []
    with pytest.raises(drlora_torch.ModelError, match=r"torch\.nn\.Module, got str"):
        drlora_torch.discover("olmoe")  # type: ignore[arg-type]


def _quantized(dtype: torch.dtype) -> Any:
    model = models.build()
    experts = model.model.layers[1].mlp.experts
    weight = experts.down_proj.detach().to(dtype)
    experts.down_proj = nn.Parameter(weight, requires_grad=False)
    return model


OBSTACLES = [
    (lambda: models.build().to("meta"), "on the meta device; load the weights first"),
    (lambda: _quantized(torch.int8), r"down_proj is quantized \(int8\)"),
    (lambda: _quantized(torch.uint8), r"down_proj is quantized \(uint8\)"),
    (lambda: _quantized(torch.float8_e4m3fn), r"down_proj is quantized \(float8_e4m3fn\)"),
]


@pytest.mark.parametrize(("make", "message"), OBSTACLES, ids=[m for _, m in OBSTACLES])
def test_obstacles(make: Any, message: str) -> None:
    model = make()
    record = drlora_torch.discover(model)[1]
    assert record.projections == {}
    assert record.num_experts == models.EXPERTS
    required = [parameter.requires_grad for parameter in model.parameters()]
    engine = helpers.engine()
    with pytest.raises(drlora_torch.ModelError, match=message):
        drlora_torch.attach(model, engine)
    assert engine.layer_names == ()
    assert [parameter.requires_grad for parameter in model.parameters()] == required


def test_other_obstacles() -> None:
    model = models.build()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(7, 32, 24))
    model.model.layers[1].mlp.experts.gate_up_proj = nn.Parameter(torch.zeros(5, 4))
    first, second = drlora_torch.discover(model)
    assert first.obstacle == "its projections have 8 and 7 experts"
    assert second.obstacle == "its gate_up_proj is not a 3-D tensor"


def test_a_layer_with_an_obstacle_may_be_left_out() -> None:
    model = _quantized(torch.int8)
    adapter = helpers.attach(model, layers=["model.layers.0.*"])
    assert list(adapter.ranks()) == ["model.layers.0.mlp.experts"]
