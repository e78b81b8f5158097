"""What cannot be adapted is listed with a reason, and attaching to it is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import drlora_torch
from tests.torch import helpers, models
from tests.torch.conventions.families import FAMILIES, build
from tests.torch.models import EXPERTS, HIDDEN, INNER, SIZES


def _doge() -> nn.Module:
    config = transformers.DogeConfig(
        **SIZES, intermediate_size=INNER, is_moe=True, num_experts=16, keep_window_size=8
    )
    return transformers.DogeForCausalLM(config)


def _vitpose() -> nn.Module:
    config = transformers.VitPoseBackboneConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=(32, 16),
        patch_size=(8, 8),
        num_experts=EXPERTS,
        part_features=8,
    )
    return transformers.VitPoseBackbone(config)


def _with_experts(experts: nn.Module) -> nn.Module:
    """A small model one of whose experts modules a quantizer has replaced."""
    model = models.build("gpt_oss")
    model.model.layers[1].mlp.experts = experts
    return model


def _mxfp4() -> nn.Module:
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    return _with_experts(Mxfp4GptOssExperts(models.build("gpt_oss").config))


REFUSED = [
    (_doge, "DogeCDMoE", 16, "one row of an embedding"),
    (_vitpose, "VitPoseNaiveMoe", EXPERTS, "no router and no routing weight"),
    (_mxfp4, "Mxfp4GptOssExperts", EXPERTS, r"MXFP4.*packed_config.*Mxfp4Config\(dequantize"),
]


@pytest.mark.parametrize(("make", "experts_class", "experts", "reason"), REFUSED)
def test_refused_classes(make: Any, experts_class: str, experts: int, reason: str) -> None:
    model = make()
    found = [layer for layer in drlora_torch.discover(model) if layer.obstacle]
    assert found
    for layer in found:
        assert layer.experts_class == experts_class
        assert layer.num_experts == experts
        assert layer.convention == "none"
        assert layer.projections == {}
        assert layer.dtype != "unknown"
    required = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(drlora_torch.ModelError, match=f"{found[0].name}.*{reason}"):
        helpers.attach(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == required


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_that_are_not_loaded(family: str) -> None:
    model = build(family).to("meta")
    for layer in drlora_torch.discover(model):
        assert layer.obstacle is not None
        assert "on the meta device; load the weights first" in layer.obstacle
    with pytest.raises(drlora_torch.ModelError, match="without offloading"):
        helpers.attach(model)


FUSED = ["dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7"]


@pytest.mark.parametrize("family", FUSED)
def test_quantized_weights(family: str) -> None:
    model = build(family)
    layer = [layer for layer in drlora_torch.discover(model) if not layer.only_on_request][-1]
    projection = list(layer.projections)[-1]
    parameter, _ = FAMILIES[family].locate(model.get_submodule(layer.name), projection, 0)
    parameter.requires_grad_(False)
    parameter.data = parameter.data.to(torch.float8_e4m3fn)
    with pytest.raises(
        drlora_torch.ModelError, match=rf"{layer.name}.*{projection} is quantized \(float8_e4m3fn\)"
    ):
        helpers.attach(model)


def test_routed_attention_is_left_alone() -> None:
    model = build("jetmoe")
    adapter = helpers.attach(model)
    assert list(adapter.ranks()) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    attention = model.model.layers[0].self_attention.experts
    assert "forward" not in vars(attention.input_linear)
    assert "drlora" not in dict(attention.named_children())
    adapter.detach()
    asked = helpers.attach(model, layers=["*.self_attention.experts", "*.mlp"])
    assert len(asked.ranks()) == 4


def test_experts_called_without_their_router() -> None:
    model = build("llama4")
    helpers.attach(model)
    block = model.model.layers[0].feed_forward
    with pytest.raises(drlora_torch.ModelError, match="called without their router"):
        block.experts(torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64))


def test_offloaded_experts() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("dbrx", torch.float32)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(drlora_torch.ModelError, match=r"experts'.*w1 is on the meta device"):
        helpers.attach(model)
