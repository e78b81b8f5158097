"""FP8 and MXFP4 checkpoints whose experts stay packed, beside what Transformers unpacks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import drlora_torch
from drlora_torch.errors import ModelError
from drlora_torch.models.interface import INTERFACE
from drlora_torch.quantized import holders
from drlora_torch.quantized.scaled import ScaledWeight
from tests.marks import slow_but
from tests.torch import helpers
from tests.torch.quantized import checkpoints
from tests.torch.test_life import Picture

pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
MODELS = {"qwen3_moe": checkpoints.qwen3_moe, "deepseek_v3": checkpoints.deepseek_v3}


def load_both(folder: Path) -> tuple[Any, Any]:
    """The model with packed experts, and the one that Transformers unpacks."""
    auto = transformers.AutoModelForCausalLM
    packed = auto.from_pretrained(folder, config=drlora_torch.packed_config(folder))
    return packed.train(), auto.from_pretrained(folder).train()


def weights(model: Any) -> dict[str, Tensor]:
    """All expert weights as [N, I, O], by name."""
    return {
        f"{layer.name}.{projection}": INTERFACE.stored(
            model.get_submodule(layer.name), projection
        ).matrices(0, layer.num_experts, torch.bfloat16)
        for layer in drlora_torch.discover(model)
        for projection in layer.projections
    }


def assert_trains_alike(packed: Any, plain: Any, folder: Path) -> None:
    """Losses, ranks and the adapter's file are those of unpacked weights, bit for bit."""
    losses, ranks = [], []
    for model in (packed, plain):
        adapter = helpers.attach(model)
        optimizer = helpers.adamw(adapter)
        losses.append([helpers.step(model, optimizer, seed) for seed in range(6)])
        ranks.append(helpers.rank_history(adapter))
        adapter.save_pretrained(folder / type(model).__name__)
        adapter.detach()
    assert losses[0] == losses[1]
    assert ranks[0] == ranks[1]


def test_mxfp4_is_what_transformers_unpacks(tmp_path: Path) -> None:
    tensors = checkpoints.write_mxfp4(tmp_path / "base")
    packed, plain = load_both(tmp_path / "base")
    found = drlora_torch.discover(packed)
    assert {layer.dtype for layer in found} == {"mxfp4"}
    blocks = [
        tensor.nbytes for name, tensor in tensors.items() if name.endswith(("_blocks", "_scales"))
    ]
    assert sum(layer.nbytes for layer in found) == sum(blocks)
    for name, weight in weights(packed).items():
        stored = (tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        assert torch.equal(weight, convert_moe_packed_tensors(*stored))
        assert torch.equal(weight, plain.get_parameter(name))
    assert_trains_alike(packed, plain, tmp_path)


def test_an_adapter_of_mxfp4_loads_on_bfloat16_and_back(tmp_path: Path) -> None:
    checkpoints.write_mxfp4(tmp_path / "base")
    packed, plain = load_both(tmp_path / "base")
    adapter = helpers.attach(packed)
    optimizer = helpers.adamw(adapter)
    for seed in range(4):
        helpers.step(packed, optimizer, seed)
    adapter.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        want = packed(input_ids=ids).logits
        drlora_torch.load(plain, tmp_path / "adapter")  # the weights are the same: no warning
        assert torch.equal(plain(input_ids=ids).logits, want)
        adapter.detach()
        drlora_torch.load(packed, tmp_path / "adapter")
        assert torch.equal(packed(input_ids=ids).logits, want)


def test_mxfp4_is_saved_as_it_was_read(tmp_path: Path) -> None:
    tensors = checkpoints.write_mxfp4(tmp_path / "base")
    packed, _ = load_both(tmp_path / "base")
    helpers.attach(packed).detach()
    packed.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["quantization_config"] == checkpoints.MXFP4
    _, plain = load_both(tmp_path / "again")
    drlora_torch.dequantize_experts(packed)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, packed.get_parameter(name))


@pytest.mark.parametrize("scale_format", slow_but(["float", "ue8m0"], ["ue8m0"]))
@pytest.mark.parametrize("name", MODELS)
def test_fp8_is_what_transformers_unpacks(name: str, scale_format: str, tmp_path: Path) -> None:
    checkpoints.write_fp8(MODELS[name](), tmp_path / "base", scale_format)
    packed, plain = load_both(tmp_path / "base")
    assert {layer.dtype for layer in drlora_torch.discover(packed)} == {"fp8"}
    assert {layer.dtype for layer in drlora_torch.discover(plain)} == {"bfloat16"}
    for path, weight in weights(packed).items():
        assert torch.equal(weight.transpose(1, 2), plain.get_parameter(path))
    assert_trains_alike(packed, plain, tmp_path)
    with pytest.raises(ValueError, match="not serializable"):
        packed.save_pretrained(tmp_path / "again")


def test_fp8_runs_without_the_kernels_of_transformers(tmp_path: Path) -> None:
    """Also inside ``disabled()``, after ``detach``, and in a copy."""
    checkpoints.write_fp8(checkpoints.qwen3_moe(), tmp_path / "base")
    packed, plain = load_both(tmp_path / "base")
    picture = Picture(packed)
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        plain.set_experts_implementation("eager")
        want = plain(input_ids=ids).logits
        before = packed(input_ids=ids).logits
        adapter = helpers.attach(packed)
        helpers.uneven(adapter)
        with adapter.disabled():
            assert torch.equal(packed(input_ids=ids).logits, before)
        adapter.detach()
        picture.assert_unchanged(packed)
        assert torch.equal(copy.deepcopy(packed)(input_ids=ids).logits, before)
    assert (before - want).norm() < 0.02 * want.norm()  # bfloat16, in another order of sums


@pytest.mark.parametrize("write", ["mxfp4", "fp8"])
def test_merging_writes_what_the_adapted_model_computes(write: str, tmp_path: Path) -> None:
    if write == "mxfp4":
        checkpoints.write_mxfp4(tmp_path / "base")
    else:
        checkpoints.write_fp8(checkpoints.deepseek_v3(), tmp_path / "base")
    packed, plain = load_both(tmp_path / "base")
    adapter = helpers.attach(packed)
    optimizer = helpers.adamw(adapter)
    for seed in range(6):
        helpers.step(packed, optimizer, seed)
    report = adapter.merge_and_save(tmp_path / "merged")
    assert report.storage == "bfloat16"
    assert report.logits_error is not None
    assert report.logits_effect is not None
    assert report.logits_error < 0.2 * report.logits_effect
    adapter.save_pretrained(tmp_path / "adapter")
    other = drlora_torch.load(plain, tmp_path / "adapter")
    other.merge_and_save(tmp_path / "plain")  # by Transformers' own code
    written, wanted = (_read(tmp_path / each) for each in ("merged", "plain"))
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    with pytest.raises(ModelError, match=f"quantize=True packs nf4 and fp4.*{write}"):
        adapter.merge_and_save(tmp_path / "other", quantize=True)
    assert not (tmp_path / "other").exists()


def _read(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("code", ["fp8", "fp4", "mxfp4"])
@pytest.mark.parametrize("shape", [(3, 8, 64), (2, 5, 96), (1, 33, 32)])
def test_scaled_weights_are_codes_times_scales(code: str, shape: tuple[int, int, int]) -> None:
    """Against loops over single values; tiles at the edges of FP8 weights are cut."""
    generator = torch.Generator().manual_seed(0)
    count, rows, columns = shape
    tile = (4, 24) if code == "fp8" else (1, 32)
    grid = (count, -(-rows // tile[0]), -(-columns // tile[1]))
    scales = torch.rand(grid, generator=generator) + 0.5
    stored = scales
    if code == "fp8":
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        values = codes.float()
    else:
        halves = torch.randint(0, 16, shape, generator=generator)
        codes = (halves[..., ::2] + 16 * halves[..., 1::2]).to(torch.uint8)
        values = torch.tensor(E2M1)[halves]
        if code == "mxfp4":
            stored = torch.randint(100, 140, grid, dtype=torch.uint8, generator=generator)
            scales = 2.0 ** (stored.double() - 127)
        else:
            codes = codes.view(torch.int8)
    want = torch.empty(shape, dtype=torch.float64)
    for e, row, column in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        scale = scales[e, row // tile[0], column // tile[1]].double()
        want[e, row, column] = values[e, row, column].double() * scale
    weight = ScaledWeight((codes, stored), code, tile)
    assert weight.shape == (count, columns, rows)
    for dtype in (torch.float32, torch.bfloat16):
        have = weight.matrices(0, count, dtype)
        assert torch.equal(have, want.transpose(1, 2).to(torch.float32).to(dtype))
        assert torch.equal(weight.matrix(count - 1, dtype), have[-1])


def test_fp4_experts_of_transformers_are_read() -> None:
    """int8 with two values in a byte and a scale for 32, as DeepSeek-V4 has them."""
    module = torch.nn.Module()
    module.down_proj = torch.nn.Parameter(
        torch.randint(-128, 128, (2, 8, 32), dtype=torch.int8), requires_grad=False
    )
    module.down_proj_scale_inv = torch.nn.Parameter(torch.ones(2, 8, 2))
    found = holders.open_weight(module, "down_proj", transposed=False)
    assert found is not None
    assert (found.kind, found.shape) == ("fp4", (2, 64, 8))
    assert found.matrix(0, torch.float32)[0, 0] == E2M1[int(module.down_proj[0, 0, 0]) & 15]


def test_refusals(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    checkpoints.gpt_oss().save_pretrained(plain)
    with pytest.raises(ModelError, match=r"is not quantized.*Experts4bitConfig"):
        drlora_torch.packed_config(plain)
    path = plain / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(ModelError, match=r"quantized with 'hqq'.*mxfp4 and fp8"):
        drlora_torch.packed_config(plain)
    tensors = checkpoints.write_mxfp4(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    name = "model.layers.1.mlp.experts.down_proj_scales"
    lacking = {key: tensor for key, tensor in tensors.items() if key != name}
    damaged = {**tensors, name: torch.full_like(tensors[name], 255)}
    for changed, reason in ((lacking, f"lacks {name}"), (damaged, "is damaged.*not finite")):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=reason):
            load_both(tmp_path / "base")


def test_layouts_of_other_kernels_are_refused() -> None:
    model = checkpoints.qwen3_moe()
    model.model.layers[0].mlp.experts.config = copy.deepcopy(model.config)
    model.model.layers[0].mlp.experts.config._experts_implementation = "deepgemm_megamoe"
    with pytest.raises(ModelError, match=r"DeepGEMM Mega MoE.*experts_implementation='grouped_mm'"):
        helpers.attach(model)
