"""Quantized models in other dtypes, inside wrappers, in several files, and back again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import drlora_torch
from drlora_torch import Experts4bitConfig
from tests.torch import helpers, models
from tests.torch.quantized.checks import same_bits
from tests.torch.test_life import Picture

EXPERTS = "model.layers.0.mlp.experts"


def quantized(family: str = "olmoe", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = models.build(family, dtype)
    drlora_torch.quantize_experts(model, **options)
    return model


def unpacked(model: Any, dtype: torch.dtype | None = None) -> Any:
    plain = copy.deepcopy(model)
    drlora_torch.dequantize_experts(plain, dtype)
    return plain


def passes(model: Any, *, autocast: bool = False, **options: Any) -> list[Tensor]:
    """Logits and the gradients of the LoRA."""
    adapter = helpers.attach(model, **options)
    helpers.uneven(adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(**helpers.batch())
    out.loss.backward()
    return [out.logits.detach(), *(parameter.grad for parameter in adapter.lora_parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["ragged", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_half_precision(family: str, dtype: torch.dtype, kernel: str) -> None:
    """As its unpacked weights, bit for bit; they have the dtype of the model."""
    model = quantized(family, dtype)
    plain = unpacked(model)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    ours, theirs = passes(model, kernel=kernel), passes(plain, kernel=kernel)
    assert ours[0].dtype is dtype
    assert all(gradient.dtype is torch.float32 for gradient in ours[1:])
    for have, want in zip(ours, theirs, strict=True):
        assert bool(have.isfinite().all())
        assert bool(have.any())
        assert torch.equal(have, want)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_autocast(family: str) -> None:
    """Weights of float32, multiplied in bfloat16: rounded once, when they are unpacked."""
    model = quantized(family)
    ours, theirs = (passes(one, autocast=True) for one in (model, unpacked(model)))
    assert all(torch.equal(have, want) for have, want in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], passes(quantized(family))[0])


def test_conversion_of_the_whole_model() -> None:
    """Experts keep their bits, and the dtype that they are multiplied in."""
    model = quantized()
    packed = {k: v.clone() for k, v in model.state_dict().items() if not v.is_floating_point()}
    assert len(packed) == 2 * 2 * 4
    model.to(torch.bfloat16)
    assert all(helpers.equal(model.state_dict()[name], value) for name, value in packed.items())
    logits = model(models.tokens()).logits
    assert logits.dtype is torch.bfloat16
    plain = unpacked(model)
    assert plain.get_submodule(EXPERTS).down_proj.dtype is torch.float32
    adapter = helpers.attach(model)
    losses = [helpers.step(model, helpers.adamw(adapter), seed) for seed in (0, 0)]
    assert losses[1] < losses[0]


def test_only_the_experts_change() -> None:
    model = models.build("gpt_oss")
    model.get_input_embeddings().weight.requires_grad_(False)
    base, picture = copy.deepcopy(model), Picture(model)
    drlora_torch.quantize_experts(model)
    for name, parameter in base.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            assert not model.get_parameter(name).requires_grad
        else:
            assert helpers.equal(model.get_parameter(name), parameter)
            assert model.get_parameter(name).requires_grad == parameter.requires_grad
    drlora_torch.dequantize_experts(model)
    now = Picture(model)
    for field in ("training", "implementation", "hooks", "modules", "required", "configs"):
        assert getattr(now, field) == getattr(picture, field), field
    assert now.config == picture.config
    assert sorted(now.names) == sorted(picture.names)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dequantized_to_another_dtype(dtype: torch.dtype) -> None:
    model = quantized()
    weights, other = unpacked(model).state_dict(), unpacked(model, dtype)
    for name, value in other.state_dict().items():
        wanted = weights[name].to(dtype) if "experts" in name else weights[name]
        assert helpers.equal(value, wanted)


def test_quantizing_again_changes_little() -> None:
    """Without double quantization the same codes and scales come out, but for rounding."""
    model = quantized(double_quant=False)
    again = unpacked(model)
    drlora_torch.quantize_experts(again, double_quant=False)
    assert same_bits(again, model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_generation(family: str) -> None:
    model = quantized(family).eval()
    plain = unpacked(model)
    adapters = [helpers.attach(one) for one in (model, plain)]
    for adapter in adapters:
        helpers.uneven(adapter)
    texts = [one.generate(models.tokens(), max_new_tokens=6) for one in (model, plain)]
    assert torch.equal(*texts)
    assert texts[0].shape == (3, 13)


# -- wrappers --------------------------------------------------------------------------------------


def _compiled(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


def _in_peft(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
@pytest.mark.parametrize("wrap", [_compiled, _in_peft])
def test_models_inside_wrappers(wrap: Any, tmp_path: Path) -> None:
    model = models.build()
    wrapped = wrap(model)
    weights = dict(model.named_parameters())
    drlora_torch.quantize_experts(wrapped)
    assert [record.dtype for record in drlora_torch.discover(wrapped)] == ["nf4", "nf4"]
    wanted = quantized().state_dict()
    for suffix in ("down_proj", "down_proj_absmax", "gate_up_proj_offset"):
        name = f"{EXPERTS}.{suffix}"
        assert helpers.equal(model.get_parameter(name), wanted[name])
    if wrap is _compiled:
        model.save_pretrained(tmp_path)
        assert same_bits(type(model).from_pretrained(tmp_path), quantized())
    drlora_torch.dequantize_experts(wrapped)
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own
@pytest.mark.parametrize("family", ["olmoe", pytest.param("gpt_oss", marks=pytest.mark.exhaustive)])
def test_compiled_training_is_the_same(family: str) -> None:
    """The whole model, with and without an adapter; each experts module is one graph break."""
    runs = []
    for wrap in (_compiled, lambda model: model):
        torch.compiler.reset()
        model = quantized(family)
        forward = wrap(model)
        with torch.no_grad():
            logits = forward(models.tokens()).logits
        optimizer = helpers.adamw(helpers.attach(model))
        runs.append((logits, [helpers.step(forward, optimizer, seed) for seed in range(5)]))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-5)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)


@pytest.mark.slow
def test_an_adapter_before_and_after() -> None:
    """Quantized once the adapter is detached; the next one trains on packed experts."""
    model = models.build()
    helpers.attach(model).detach()
    drlora_torch.quantize_experts(model)
    assert same_bits(model, quantized())
    helpers.attach(model).detach()
    drlora_torch.dequantize_experts(model)
    assert same_bits(model, unpacked(quantized()))


# -- files -----------------------------------------------------------------------------------------


def test_a_configuration_that_is_given_again(tmp_path: Path) -> None:
    """Transformers says that it takes the one of the checkpoint."""
    model = quantized(quant_type="fp4")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = type(model).from_pretrained(tmp_path, quantization_config=Experts4bitConfig())
    assert same_bits(again, model)
    assert again.config.quantization_config.quant_type == "fp4"


@pytest.mark.slow
def test_checkpoints_of_several_files(tmp_path: Path) -> None:
    base = models.build("gpt_oss")
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    config = Experts4bitConfig(quant_type="fp4", double_quant=False)
    model = type(base).from_pretrained(tmp_path / "base", quantization_config=config)
    assert same_bits(model, quantized("gpt_oss", quant_type="fp4", double_quant=False))
    model.save_pretrained(tmp_path / "packed", max_shard_size="10KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 2
    assert same_bits(type(base).from_pretrained(tmp_path / "packed"), model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_while_loading_is_that_of_unpacked_weights(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = models.build()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(
        tmp_path / "base", dtype=dtype, quantization_config=Experts4bitConfig()
    )
    assert same_bits(model, quantized(dtype=dtype))
    model.save_pretrained(tmp_path / "packed")
    again = type(base).from_pretrained(tmp_path / "packed")
    assert same_bits(again, model)
    assert unpacked(again).get_submodule(EXPERTS).down_proj.dtype is dtype


def test_an_adapted_model_is_saved_packed(tmp_path: Path) -> None:
    """``model.save_pretrained`` writes the packed base without the LoRA."""
    model = quantized()
    adapter = helpers.attach(model)
    helpers.uneven(adapter)
    model.save_pretrained(tmp_path)
    assert same_bits(type(model).from_pretrained(tmp_path), quantized())
