"""What cannot be quantized, or read, is refused with its value and a way out; nothing changes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import drlora_torch
from drlora_torch import AttachError, Experts4bitConfig, ModelError
from drlora_torch.quantized.four_bit import FourBit
from tests.torch import helpers, models
from tests.torch.conventions import families
from tests.torch.test_life import Picture


def refused(model: Any, action: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Check that an action is refused with one of our errors, and leaves the model as it is."""
    assert issubclass(error, ValueError)
    picture = Picture(model)
    with pytest.raises(error, match=message):
        action()
    picture.assert_unchanged(model)


# -- bitsandbytes ----------------------------------------------------------------------------------


def test_bitsandbytes_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = models.build()
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"need bitsandbytes, which cannot be imported .*pip install 'drlora\[quantized\]'"
    refused(model, lambda: drlora_torch.quantize_experts(model), ModelError, message)
    with pytest.raises(ModelError, match=message):
        type(model).from_pretrained(tmp_path, quantization_config=Experts4bitConfig())


def test_bitsandbytes_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = models.build()
    model.save_pretrained(tmp_path)
    message = r"bitsandbytes 0\.50 or newer, and 0\.49\.2 is installed; pip install -U"
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes, "__version__", "0.49.2")
        refused(model, lambda: drlora_torch.quantize_experts(model), ModelError, message)
        with pytest.raises(ModelError, match=message):
            type(model).from_pretrained(tmp_path, quantization_config=Experts4bitConfig())
    for version in ("0.50.0", "1.0.0.dev0"):
        with monkeypatch.context() as patch:
            patch.setattr(bitsandbytes, "__version__", version)
            drlora_torch.quantize_experts(models.build())


# -- models ----------------------------------------------------------------------------------------


def _with(value: float) -> Any:
    model = models.build()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = value
    return model


def _of_mixed_dtypes() -> Any:
    model = models.build()
    model.model.layers[1].mlp.experts.to(torch.float64)
    return model


def _quantized() -> Any:
    model = models.build()
    drlora_torch.quantize_experts(model)
    return model


def _adapted() -> Any:
    model = models.build()
    model.adapter = helpers.attach(model)
    return model


LINEARS = r"'encoder\.block\.1\.layer\.1\.mlp' are Linears, one each .*BitsAndBytesConfig\(load_in"
ADAPTED = r"layer 'model\.layers\.0\.mlp\.experts' has an adapter.* or call adapter\.detach\(\)"
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "quantized": (_quantized, ModelError, r"is quantized already \(nf4\); .*dequantize_experts"),
    "adapted": (_adapted, AttachError, ADAPTED),
    "on meta": (
        lambda: models.build().to("meta"),
        ModelError,
        r"'model\.layers\.0\.mlp\.experts' cannot be quantized: its gate_up_proj is on the meta "
        "device; load the weights first",
    ),
    "float64": (
        lambda: models.build(dtype=torch.float64),
        ModelError,
        r"gate_up_proj of layer 'model\.layers\.0\.mlp\.experts' is torch\.float64; only float32, "
        r"bfloat16, float16 .*dtype=torch\.bfloat16, or convert",
    ),
    "float64 in one layer": (_of_mixed_dtypes, ModelError, r"layers\.1.*is torch\.float64"),
    "nan": (
        lambda: _with(float("nan")),
        ModelError,
        r"down_proj of layer 'model\.layers\.1.*not f",
    ),
    "inf": (lambda: _with(float("inf")), ModelError, "values that are not finite.*load a checkp"),
    "-inf": (lambda: _with(-float("inf")), ModelError, "values that are not finite"),
    "Linears": (
        lambda: families.build("switch_transformers", torch.float32),
        ModelError,
        LINEARS,
    ),
    "no experts": (lambda: nn.Linear(3, 3), ModelError, "Linear has no mixture-of-experts layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_quantized(case: str) -> None:
    build, error, message = REFUSED[case]
    model = build()
    if case == "on meta":
        with pytest.raises(error, match=message):
            drlora_torch.quantize_experts(model)
        assert all(parameter.is_meta for parameter in model.parameters())
    elif "nan" in case:  # which is not equal to itself
        with pytest.raises(error, match=message):
            drlora_torch.quantize_experts(model)
        assert drlora_torch.discover(model) == drlora_torch.discover(models.build())
    else:
        refused(model, lambda: drlora_torch.quantize_experts(model), error, message)


DEQUANTIZED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "plain": (models.build, ModelError, "OlmoeForCausalLM has no experts that drlora has packed"),
    "Linears": REFUSED["Linears"],
    "no experts": REFUSED["no experts"],
}


@pytest.mark.parametrize("case", DEQUANTIZED)
def test_models_that_cannot_be_dequantized(case: str) -> None:
    build, error, message = DEQUANTIZED[case]
    model = build()
    refused(model, lambda: drlora_torch.dequantize_experts(model), error, message)


def test_an_adapter_keeps_experts_packed() -> None:
    model = _quantized()
    adapter = helpers.attach(model)
    refused(model, lambda: drlora_torch.dequantize_experts(model), AttachError, ADAPTED)
    packed = (
        r"'model\.layers\.0\.mlp\.experts' are stored as nf4, .*merge_and_save\(path\), or .*de"
    )
    refused(model, adapter.merge, AttachError, packed)
    refused(model, lambda: adapter.merge(keep_originals=False), AttachError, packed)
    assert adapter.is_active
    helpers.step(model, helpers.adamw(adapter))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn, 16])
def test_dtypes_that_experts_cannot_have(dtype: Any) -> None:
    model = _quantized()
    refused(
        model,
        lambda: drlora_torch.dequantize_experts(model, dtype),
        ModelError,
        r"dtype must be torch\.float32, .* got ",
    )


def test_what_is_no_model() -> None:
    for change in (drlora_torch.quantize_experts, drlora_torch.dequantize_experts):
        with pytest.raises(ModelError, match=r"must be a torch\.nn\.Module, got dict"):
            change({})  # type: ignore[operator]


# -- options ---------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"quant_type": "int4"}, "quant_type must be 'nf4' or 'fp4', got 'int4'"),
    ({"quant_type": "NF4"}, "quant_type must be 'nf4' or 'fp4', got 'NF4'"),
    ({"quant_type": None}, "quant_type must be 'nf4' or 'fp4', got None"),
    ({"double_quant": 1}, "double_quant must be True or False, got 1"),
    ({"double_quant": "yes"}, "double_quant must be True or False, got 'yes'"),
]
MORE: list[tuple[dict[str, Any], str]] = [
    *OPTIONS,
    ({"blocksize": 128}, "has no option blocksize; it has quant_type, double_quant and rest"),
    ({"a": 1, "b": 2}, "has no option a, b; it has"),
    ({"rest": "nf4"}, r"rest must be a BitsAndBytesConfig\(load_in_4bit=True\), got 'nf4'"),
    ({"rest": {"load_in_8bit": True}}, r"rest must be a BitsAndBytesConfig\(load_in_4bit=True\)"),
]


@pytest.mark.parametrize(("options", "message"), MORE, ids=str)
def test_options_of_the_configuration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Experts4bitConfig(**options)
    with pytest.raises(ModelError, match=message):
        Experts4bitConfig.from_dict({"quant_method": "drlora_experts_4bit", **options})


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
def test_options_of_quantizing_in_memory(options: dict[str, Any], message: str) -> None:
    model = models.build()
    refused(model, lambda: drlora_torch.quantize_experts(model, **options), ModelError, message)


# -- while loading ---------------------------------------------------------------------------------


def _llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
    )
    return transformers.LlamaForCausalLM(config)


LOADED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "Linears": (REFUSED["Linears"][0], {}, LINEARS),
    "no experts": (_llama, {}, "LlamaForCausalLM has no mixture-of-experts layer"),
    "float64": (models.build, {"dtype": torch.float64}, r"is torch\.float64; only .*bfloat16"),
    "nan": (REFUSED["nan"][0], {}, r"damaged: model\.layers\.1\.mlp\.experts\.down_proj has sc"),
    "inf": (REFUSED["inf"][0], {}, r"damaged: model\.layers\.1\.mlp\.experts\.down_proj has sc"),
    "on disk": (
        models.build,
        {"device_map": {"": "disk"}, "offload_folder": "offloaded"},
        "cannot be offloaded to disk; leave it out of device_map",
    ),
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("case", LOADED)
def test_models_that_cannot_be_quantized_while_loading(
    case: str, double_quant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build, options, message = LOADED[case]
    model = build()
    model.save_pretrained(tmp_path / "base")
    config = Experts4bitConfig(double_quant=double_quant)
    with pytest.raises(ModelError, match=message):
        type(model).from_pretrained(tmp_path / "base", quantization_config=config, **options)
    assert torch.get_default_dtype() is torch.float32


DOWN = "model.layers.1.mlp.experts.down_proj"
Damage = Callable[[dict[str, Tensor]], Any]


def _without(name: str) -> Damage:
    return lambda tensors: tensors.pop(name)


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def _not_finite(suffix: str, value: float) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN + suffix].view(torch.float32).view(-1)[1] = value

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    **{
        f"no {suffix or 'codes'}": (_without(DOWN + suffix), f"lacks {DOWN}{suffix}: .*again")
        for suffix in ("", "_absmax", "_nested_absmax", "_offset")
    },
    "short codes": (_changed(DOWN, lambda t: t[:, :-1]), r"uint8 \[8, 383\] and not .*\[8, 384\]"),
    "fewer experts": (_changed(DOWN, lambda t: t[:-1]), r"\[7, 384\] and not .*again"),
    "a weight": (_changed(DOWN, lambda t: torch.ones(8, 32, 24)), r"uint8 \[8, 32, 24\] and not"),
    "scales as int32": (
        _changed(DOWN + "_absmax", lambda t: t.to(torch.int32)),
        r"down_proj_absmax is torch\.int32 \[8, 12\] and not torch\.uint8",
    ),
    "infinite scale": (_not_finite("_nested_absmax", float("inf")), f"{DOWN} has scales that are"),
    "nan scale": (_not_finite("_nested_absmax", float("nan")), "not finite; save or download"),
    "nan offset": (_not_finite("_offset", float("nan")), "the checkpoint is damaged"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model whose experts are packed."""
    folder = tmp_path_factory.mktemp("packed")
    _quantized().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoints(case: str, checkpoint: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[case]
    shutil.copytree(checkpoint, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    files = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ModelError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")
    assert sorted(path.name for path in tmp_path.rglob("*")) == files
    whole = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(
        helpers.equal(v, whole.state_dict()[k]) for k, v in _quantized().state_dict().items()
    )


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"blocksize": 64}, "has no option blocksize"),
    "quant_type": ({"quant_type": "nf5"}, "quant_type must be 'nf4' or 'fp4', got 'nf5'"),
    "scales of another format": ({"double_quant": False}, r"_absmax is torch\.uint8 .* and not"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_damaged_settings(case: str, checkpoint: Path, tmp_path: Path) -> None:
    settings, message = SETTINGS[case]
    shutil.copytree(checkpoint, tmp_path / "damaged")
    file = tmp_path / "damaged" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(settings)
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")


def test_an_interrupted_quantization_leaves_a_model_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first layer is packed, the second as it was; both can be unpacked and packed again."""
    model = models.build("qwen3_moe")
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    pack, calls = FourBit.pack, []

    def interrupted(self: FourBit, weight: Any) -> Any:
        calls.append(weight)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return pack(self, weight)

    with monkeypatch.context() as patch:
        patch.setattr(FourBit, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drlora_torch.quantize_experts(model)
    kinds = [layer.dtype for layer in drlora_torch.discover(model)]
    assert kinds == ["nf4", "float32"]
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        drlora_torch.dequantize_experts(model)
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == wanted
    drlora_torch.quantize_experts(model)
    assert {layer.dtype for layer in drlora_torch.discover(model)} == {"nf4"}
