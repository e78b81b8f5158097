"""What every model with quantized experts must do, for the table and for the other conventions.

A quantized model with an adapter runs the same products on the same numbers as the same model
after ``dequantize_experts``: bit for bit. To weights W + s B A that are written out, and run by
Transformers, it is equal to rounding.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import drlora_torch
from drlora_torch.models.quantization.places import find_places
from drlora_torch.quantized import holders
from tests.torch import helpers, reference
from tests.torch.quantized import decoder
from tests.torch.quantized.cases import Case
from tests.torch.test_life import Picture

OUTPUTS, GRADIENTS = 2e-6, 2e-5
"""Relative errors in float32: twice what the table needs, of outputs and of gradients."""
LARGEST = 4 * 2 * 24 * 32
"""Bytes of the largest weight of an expert of these models, unpacked."""
CANCELLED = 5e-9
"""Error of the gradient of a scalar, where larger numbers cancel."""


def distance(have: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    have, want = have.detach().double(), want.detach().double()
    return float((have - want).norm() / want.norm().clamp(min=1e-30))


def same_bits(left: Any, right: Any) -> bool:
    """True if two models have the same tensors, bit for bit, in any order."""
    have, want = left.state_dict(), right.state_dict()
    return have.keys() == want.keys() and all(helpers.equal(have[k], want[k]) for k in want)


def agree(case: Case, have: Tensor, want: Tensor, rounding: float) -> bool:
    """Bit for bit, or to rounding where a layer is run by Transformers."""
    if case.exact:
        return torch.equal(have, want)
    return distance(have, want) < rounding or float((have - want).norm()) < CANCELLED


# -- the same as dequantized weights ---------------------------------------------------------------


def check_against_dequantized(case: Case) -> None:
    """Weights, records, outputs with and without an adapter, and all gradients."""
    base = case.build()
    model = copy.deepcopy(base)
    sizes = drlora_torch.quantize_experts(model, **case.form)
    _check_records(base, model, case, sizes)
    plain = copy.deepcopy(model)
    drlora_torch.dequantize_experts(plain)
    _check_weights(base, model, plain, case)
    assert distance(case.evaluate(model), case.evaluate(plain)) < OUTPUTS
    written = copy.deepcopy(plain)
    ours, adapter = _passes(case, model)
    theirs, _ = _passes(case, plain)
    for have, want in zip(ours, theirs, strict=True):
        assert (have is None) == (want is None)
        if have is not None and want is not None:
            assert agree(case, have, want, GRADIENTS)
    _check_against_written(case, model, adapter, _write(case, written, adapter))


def _check_records(base: Any, model: Any, case: Case, sizes: Any) -> None:
    before, after = drlora_torch.discover(base), drlora_torch.discover(model)
    for one, other in zip(before, after, strict=True):
        assert (one.dtype, other.dtype) == ("float32", case.form["quant_type"])
        assert other.obstacle is None
        assert (one.name, one.num_experts, one.router) == (
            other.name,
            other.num_experts,
            other.router,
        )
        assert one.projections == other.projections
        assert (one.convention, one.experts_class) == (other.convention, other.experts_class)
    assert sizes.before == sum(layer.nbytes for layer in before)
    assert sizes.after == sum(layer.nbytes for layer in after)
    assert sizes.after < 0.16 * sizes.before


def _check_weights(base: Any, model: Any, plain: Any, case: Case) -> None:
    """Experts are what the slow decoder makes of the packed bits; all else is as it was."""
    unpacked = plain.state_dict()
    assert unpacked.keys() == base.state_dict().keys()
    expected = base.state_dict()
    names = {id(module): name for name, module in model.named_modules()}
    for place in find_places(model):
        form: Any = holders.formats(place.holder)[place.name]
        assert (form.quant_type, form.double_quant) == tuple(case.form.values())
        packed = {s: getattr(place.holder, place.name + s) for s in form.empty("meta")}
        name = f"{names[id(place.holder)]}.{place.name}"
        weight = decoder.decode(
            packed, form.quant_type, form.shape, form.num_experts, torch.float32
        )
        assert 0.0 < distance(weight, expected[name]) < 0.2
        expected[name] = weight
    for name, value in expected.items():
        assert helpers.equal(unpacked[name], value), name


def _learning(model: Any) -> list[str]:
    """Every parameter beside LoRA and experts, routers included."""
    records = drlora_torch.discover(model)
    inside = tuple(f"{record.name}." for record in records)
    routers = tuple(f"{record.router}." for record in records)
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and (name.startswith(routers) or not name.startswith(inside))
    ]


def _passes(case: Case, model: Any) -> tuple[list[Tensor | None], drlora_torch.Adapter]:
    """Output and all gradients, with unequal ranks."""
    adapter = case.attach(model, alpha=3.0)
    helpers.uneven(adapter, scale=0.5)
    ranks = helpers.rank_history(adapter)
    assert all(len(set(each)) > 2 for each in ranks.values())
    others = [model.get_parameter(name) for name in _learning(model)]
    for parameter in others:
        parameter.requires_grad_(True)
    output = case.output(model, 0)
    with torch.no_grad(), adapter.disabled():
        assert distance(case.output(model, 0), output) > 1e-3
    case.loss(model, 0).backward()
    lora = list(adapter.lora_parameters())
    assert all(bool(parameter.grad.any()) for parameter in lora)
    return [output.detach(), *(p.grad for p in lora), *(p.grad for p in others)], adapter


@torch.no_grad()
def _write(case: Case, dense: Any, adapter: drlora_torch.Adapter) -> Any:
    """Write W + s B A into unpacked weights, which then run as Transformers runs them."""
    if hasattr(dense, "set_experts_implementation"):
        dense.set_experts_implementation("eager")
    dense.requires_grad_(False)
    for name, projection, lora, _ in helpers.projections(adapter):
        for expert in range(lora.table.num_experts):
            parameter, part = case.locate(dense.get_submodule(name), projection, expert)
            part(parameter.data).add_(reference.expert_delta(lora, projection, expert))
            parameter.requires_grad_(True)
    for name in _learning(dense):
        dense.get_parameter(name).requires_grad_(True)
    return dense


def _check_against_written(
    case: Case, model: Any, adapter: drlora_torch.Adapter, dense: Any
) -> None:
    case.loss(dense, 0).backward()
    assert distance(case.output(model, 0), case.output(dense, 0)) < OUTPUTS
    for name, projection, lora, slots in helpers.projections(adapter):
        want_A, want_B = torch.zeros_like(slots.lora_A), torch.zeros_like(slots.lora_B)
        for expert in range(lora.table.num_experts):
            parameter, part = case.locate(dense.get_submodule(name), projection, expert)
            assert parameter.grad is not None
            gradient = part(parameter.grad)
            for slot in helpers.owned(lora, expert):
                want_A[slot] = lora.scaling * (slots.lora_B[slot].detach() @ gradient)
                want_B[slot] = lora.scaling * (gradient @ slots.lora_A[slot].detach())
        for have, want in ((slots.lora_A.grad, want_A), (slots.lora_B.grad, want_B)):
            assert distance(have, want) < GRADIENTS, (name, projection)
    for name in _learning(model):
        have, want = model.get_parameter(name).grad, dense.get_parameter(name).grad
        assert (have is None) == (want is None), name
        if have is not None:
            off = float((have - want).norm())
            assert off < GRADIENTS * float(want.norm()) or off < CANCELLED, name


# -- training --------------------------------------------------------------------------------------


def check_micro_batches(case: Case) -> None:
    """Accumulation and dropout, with and without checkpointing: as unpacked weights, exactly."""
    model = case.quantized()
    plain = copy.deepcopy(model)
    drlora_torch.dequantize_experts(plain)
    results = []
    for reentrant in (None, True, False) if case.checkpoint else (None,):
        ours, theirs = (_accumulated(case, one, reentrant) for one in (model, plain))
        for have, want in zip(ours, theirs, strict=True):
            assert bool(want.any())
            assert agree(case, have, want, GRADIENTS)
        results.append(ours)
    for recomputed in results[1:]:
        for have, want in zip(recomputed, results[0], strict=True):
            assert distance(have, want) < GRADIENTS


def _accumulated(case: Case, model: Any, reentrant: bool | None) -> list[Tensor]:
    """Gradients of the LoRA after two micro-batches; the model is left as it was."""
    model = copy.deepcopy(model)
    if reentrant is not None:
        assert case.checkpoint is not None
        case.checkpoint(model, reentrant)
    adapter = case.attach(model, dropout=0.3)
    helpers.uneven(adapter)
    for seed in (0, 1):
        (case.loss(model, seed) / 2).backward()
    return [parameter.grad for parameter in adapter.lora_parameters()]


def check_grouped(case: Case) -> None:
    """The other kernel, in groups of three experts: as unpacked weights, and as the first one."""
    model = case.quantized()
    plain = copy.deepcopy(model)
    drlora_torch.dequantize_experts(plain)
    results = []
    for one, kernel in ((model, "grouped"), (plain, "grouped"), (model, "ragged")):
        adapter = case.attach(one, kernel=kernel)
        helpers.uneven(adapter)
        case.loss(one, 1).backward()
        results.append([parameter.grad for parameter in adapter.lora_parameters()])
        adapter.detach()
    for grouped, dense, ragged in zip(*results, strict=True):
        assert agree(case, grouped, dense, GRADIENTS)
        assert distance(grouped, ragged) < 3e-5


def check_life(case: Case, path: Path) -> None:
    """Two adapters, growth, a file, ``disabled`` and ``detach``."""
    model = case.quantized()
    plain = copy.deepcopy(model)
    drlora_torch.dequantize_experts(plain)
    packed, picture, before = copy.deepcopy(model), Picture(model), case.evaluate(model)
    frozen = case.evaluate(packed.requires_grad_(False))  # for which torch may add otherwise
    ours, first, optimizer = _trained(case, model)
    theirs, other, _ = _trained(case, plain)
    assert ours == (theirs if case.exact else pytest.approx(theirs, rel=1e-5))
    assert helpers.rank_history(first) == helpers.rank_history(other)
    trained = case.evaluate(model)
    assert agree(case, case.evaluate(plain), trained, GRADIENTS)
    assert distance(trained, before) > 1e-3
    with first.disabled():
        assert torch.equal(case.evaluate(model), frozen)
    first.save_pretrained(path)
    again = drlora_torch.load(packed, path)
    assert torch.equal(case.evaluate(packed), trained)
    resumed = helpers.adamw(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [case.step(packed, resumed, seed) for seed in (5, 6)] == [
        case.step(model, optimizer, seed) for seed in (5, 6)
    ]
    assert helpers.rank_history(again) == helpers.rank_history(first)
    assert len(first.events) == 2
    for one in (model, plain, packed):
        for adapter in drlora_torch.adapters(one).values():
            adapter.detach()
    picture.assert_unchanged(model)
    assert torch.equal(case.evaluate(model), before)


def _trained(case: Case, model: Any) -> tuple[list[float], drlora_torch.Adapter, Any]:
    """Train two adapters in turn; the losses, the first adapter and its optimizer."""
    first = case.attach(model, adapter_name="first", dropout=0.1)
    optimizer = helpers.adamw(first)
    losses = [case.step(model, optimizer, seed) for seed in range(4)]
    ranks = helpers.rank_history(first)
    assert len(first.events) == 1  # growth, which made ranks unequal
    assert any(len(set(each)) > 1 for each in ranks.values())
    second = case.attach(model, adapter_name="second", config={"r_init": 1, "r_target": 3})
    other = helpers.adamw(second)
    losses += [case.step(model, other, seed) for seed in range(2)]
    first.activate()
    return [*losses, case.step(model, optimizer, 4)], first, optimizer


# -- files and copies ------------------------------------------------------------------------------


def check_files(case: Case, path: Path) -> None:
    """Quantized while loading, in memory, and read from a packed checkpoint: the same bits."""
    base = case.pretrained(case.build())
    model = copy.deepcopy(base)
    drlora_torch.quantize_experts(model, **case.form)
    base.save_pretrained(path / "base")
    config = drlora_torch.Experts4bitConfig(**case.form)
    loaded = _read(model, path / "base", quantization_config=config)
    assert same_bits(loaded, model)
    assert not same_bits(loaded, base)
    loaded.save_pretrained(path / "once")
    model.save_pretrained(path / "memory")
    read = [_read(model, path / name) for name in ("once", "memory")]
    read[0].save_pretrained(path / "twice")
    read.append(_read(model, path / "twice"))
    assert all(same_bits(each, model) for each in read)
    files = [(path / name / "model.safetensors").read_bytes() for name in ("once", "twice")]
    assert files[0] == files[1]
    size = (path / "base" / "model.safetensors").stat().st_size
    assert len(files[0]) < size
    for one in (model, read[0]):
        drlora_torch.dequantize_experts(one)
    assert same_bits(read[0], model)
    assert read[0].state_dict().keys() == base.state_dict().keys()
    read[0].save_pretrained(path / "unpacked")
    unpacked = _read(model, path / "unpacked")
    assert same_bits(unpacked, model)
    assert getattr(unpacked, "hf_quantizer", None) is None


def _read(model: Any, path: Path, **options: Any) -> Any:
    """What ``from_pretrained`` makes of a folder, with every weight and no other."""
    found, report = type(model).from_pretrained(path, output_loading_info=True, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found


def check_copies(case: Case) -> None:
    """A copy of a quantized model shares no tensor with it, and can be unpacked alone."""
    model = case.quantized()
    before, twin = case.evaluate(model), copy.deepcopy(model)
    assert same_bits(twin, model)
    assert _storages(model).isdisjoint(_storages(twin))
    assert torch.equal(case.evaluate(twin), before)
    with torch.no_grad():
        for module in twin.modules():
            for name in holders.formats(module):
                getattr(module, name).bitwise_not_()
    assert torch.equal(case.evaluate(model), before)
    changed = case.evaluate(twin)
    assert not torch.equal(changed, before)
    packed = {name: value.clone() for name, value in model.state_dict().items()}
    drlora_torch.dequantize_experts(twin)
    assert distance(case.evaluate(twin), changed) < OUTPUTS
    assert all(helpers.equal(value, packed[name]) for name, value in model.state_dict().items())
    assert torch.equal(case.evaluate(model), before)


def _storages(model: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}
